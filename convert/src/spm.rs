//! `tokenizer.model`: the SentencePiece protobuf of Llama 2 and Mistral, read without a protobuf
//! library. Only the fields that GGUF needs; every length is checked.
//!
//! Field numbers from `sentencepiece_model.proto`: `ModelProto.pieces` 1 (`piece` 1, `score` 2, `type` 3),
//! `trainer_spec` 2 (`model_type` 3), `normalizer_spec` 3 (`add_dummy_prefix` 3,
//! `remove_extra_whitespaces` 4).

/// One piece of the vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// Text, with `▁` for a space.
    pub text: String,
    /// Merge priority: the larger, the earlier.
    pub score: f32,
    /// 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte: as in `tokenizer.ggml.token_type`.
    pub kind: i32,
}

/// What is needed of the model.
#[derive(Clone, Debug, PartialEq)]
pub struct SpmModel {
    /// The vocabulary in the order of the ids.
    pub pieces: Vec<Piece>,
    /// 1 unigram, 2 BPE.
    pub model_type: u64,
    /// Whether text gets a space in front.
    pub add_dummy_prefix: bool,
    /// Whether runs of spaces are merged.
    pub remove_extra_whitespaces: bool,
}

/// A field of a message.
enum Field<'a> {
    Varint(u64),
    Fixed32([u8; 4]),
    Bytes(&'a [u8]),
    /// 64-bit values, which no field here uses.
    Skipped,
}

/// Walks the fields of a message.
struct Message<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Message<'a> {
    fn new(bytes: &'a [u8]) -> Message<'a> {
        Message { bytes, at: 0 }
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = *self
                .bytes
                .get(self.at)
                .ok_or_else(|| format!("ends inside a number at byte {}", self.at))?;
            self.at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(format!(
            "has a number of more than 64 bits at byte {}",
            self.at
        ))
    }

    fn take(&mut self, n: u64) -> Result<&'a [u8], String> {
        let left = self.bytes.len() - self.at;
        let n = usize::try_from(n)
            .ok()
            .filter(|&n| n <= left)
            .ok_or_else(|| {
                format!(
                    "has a field of {n} bytes at byte {} of {}",
                    self.at,
                    self.bytes.len()
                )
            })?;
        let taken = &self.bytes[self.at..self.at + n];
        self.at += n;
        Ok(taken)
    }

    /// The next field's number and value; `None` at the end.
    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>, String> {
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Field::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Field::Skipped
            }
            2 => {
                let n = self.varint()?;
                Field::Bytes(self.take(n)?)
            }
            5 => {
                let bytes = self.take(4)?;
                Field::Fixed32([bytes[0], bytes[1], bytes[2], bytes[3]])
            }
            wire => {
                return Err(format!(
                    "has a field of unknown wire type {wire} at byte {}",
                    self.at
                ));
            }
        };
        Ok(Some((tag >> 3, value)))
    }
}

impl SpmModel {
    /// Reads the protobuf. The error is the rest of a sentence that starts with the file's name.
    pub fn parse(bytes: &[u8]) -> Result<SpmModel, String> {
        let mut model = SpmModel {
            pieces: Vec::new(),
            model_type: 1,
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
        };
        let mut message = Message::new(bytes);
        while let Some((number, field)) = message.next()? {
            match (number, field) {
                (1, Field::Bytes(piece)) => {
                    let index = model.pieces.len();
                    model
                        .pieces
                        .push(piece_of(piece).map_err(|error| format!("piece {index} {error}"))?);
                }
                (2, Field::Bytes(trainer)) => {
                    let mut trainer = Message::new(trainer);
                    while let Some((number, field)) = trainer.next()? {
                        if let (3, Field::Varint(value)) = (number, field) {
                            model.model_type = value;
                        }
                    }
                }
                (3, Field::Bytes(normalizer)) => {
                    let mut normalizer = Message::new(normalizer);
                    while let Some((number, field)) = normalizer.next()? {
                        match (number, field) {
                            (3, Field::Varint(value)) => model.add_dummy_prefix = value != 0,
                            (4, Field::Varint(value)) => {
                                model.remove_extra_whitespaces = value != 0
                            }
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        if model.pieces.is_empty() {
            return Err("is not a SentencePiece model: it has no pieces".into());
        }
        Ok(model)
    }
}

fn piece_of(bytes: &[u8]) -> Result<Piece, String> {
    let mut piece = Piece {
        text: String::new(),
        score: 0.0,
        kind: 1,
    };
    let mut message = Message::new(bytes);
    while let Some((number, field)) = message.next()? {
        match (number, field) {
            (1, Field::Bytes(text)) => {
                piece.text = std::str::from_utf8(text)
                    .map_err(|_| "is not valid UTF-8".to_string())?
                    .to_owned();
            }
            (2, Field::Fixed32(score)) => piece.score = f32::from_le_bytes(score),
            (3, Field::Varint(kind)) => {
                piece.kind = i32::try_from(kind)
                    .ok()
                    .filter(|kind| (1..=6).contains(kind))
                    .ok_or_else(|| format!("has unknown type {kind}"))?;
            }
            _ => {}
        }
    }
    Ok(piece)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2, bytes.len() as u8];
        out.extend_from_slice(bytes);
        out
    }

    fn sample() -> Vec<u8> {
        let mut unknown = field(1, b"<unk>");
        unknown.extend([3 << 3, 2]);
        let mut piece = field(1, "▁the".as_bytes());
        piece.push(2 << 3 | 5);
        piece.extend((-3.5f32).to_le_bytes());
        let mut model = field(1, &unknown);
        model.extend(field(1, &piece));
        model.extend(field(2, &[3 << 3, 2]));
        model.extend(field(3, &[3 << 3, 0]));
        model
    }

    #[test]
    fn reads_pieces_and_specs() {
        let model = SpmModel::parse(&sample()).unwrap();
        assert_eq!(model.pieces.len(), 2);
        assert_eq!(
            (model.pieces[0].text.as_str(), model.pieces[0].kind),
            ("<unk>", 2)
        );
        assert_eq!(model.pieces[1].score, -3.5);
        assert_eq!(model.model_type, 2);
        assert!(!model.add_dummy_prefix);
        assert!(model.remove_extra_whitespaces);
    }

    #[test]
    fn every_cut_is_refused_or_shorter() {
        let bytes = sample();
        let whole = SpmModel::parse(&bytes).unwrap();
        for n in 0..bytes.len() {
            if let Ok(model) = SpmModel::parse(&bytes[..n]) {
                assert_ne!(model, whole, "cut at {n}");
            }
        }
        assert!(
            SpmModel::parse(&[
                0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01
            ])
            .is_err()
        );
        assert!(SpmModel::parse(b"bpe tokens as text").is_err());
    }
}
