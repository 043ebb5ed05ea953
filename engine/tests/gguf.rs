//! GGUF reader and writer: what is written is read back, and broken files are refused with words.

use mneme_engine::gguf::{Array, Error, ErrorKind, GgmlType, Gguf, GgufWriter, Value, split_name};
use proptest::prelude::*;

/// A small file with every value type, arrays, and tensors of several types.
fn sample() -> GgufWriter {
    let mut w = GgufWriter::new();
    w.set("general.architecture", "llama")
        .set("t.u8", 200u8)
        .set("t.i8", -3i8)
        .set("t.u16", 60000u16)
        .set("t.i16", -30000i16)
        .set("t.u32", 7u32)
        .set("t.i32", -7i32)
        .set("t.f32", 1.5f32)
        .set("t.bool", true)
        .set("t.u64", u64::MAX)
        .set("t.i64", i64::MIN)
        .set("t.f64", 0.1f64)
        .set("t.text", "größe 🦙")
        .set("a.u8", vec![1u8, 2])
        .set("a.i8", vec![-1i8])
        .set("a.u16", vec![1u16, 65535])
        .set("a.i16", vec![-1i16, 2])
        .set("a.u32", vec![1u32, 2, 3])
        .set("a.i32", vec![-1i32, 2])
        .set("a.f32", vec![0.5f32, -0.5])
        .set("a.bool", vec![true, false])
        .set(
            "a.str",
            vec!["a".to_string(), String::new(), "ß".to_string()],
        )
        .set("a.u64", vec![1u64])
        .set("a.i64", vec![-1i64, i64::MAX])
        .set("a.f64", vec![1e300f64])
        .set("a.empty", Vec::<f32>::new());
    w.tensor("x.weight", &[4, 3], GgmlType::F32).unwrap();
    w.tensor("y.weight", &[32, 2], GgmlType::Q8_0).unwrap();
    w.tensor("scalar", &[], GgmlType::F32).unwrap();
    w.tensor("none", &[0], GgmlType::F32).unwrap();
    w.tensor("z.weight", &[5], GgmlType::BF16).unwrap();
    w
}

fn sample_data() -> Vec<Vec<u8>> {
    [48usize, 68, 4, 0, 10]
        .iter()
        .enumerate()
        .map(|(i, &n)| (0..n).map(|b| (b * 7 + i) as u8).collect())
        .collect()
}

fn sample_bytes() -> Vec<u8> {
    let data = sample_data();
    let slices: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    sample().to_bytes(&slices).unwrap()
}

fn check_sample(g: &Gguf) {
    assert_eq!(g.version(), 3);
    assert_eq!(g.keys(), sample().keys());
    assert_eq!(g.str("t.text").unwrap(), "größe 🦙");
    assert_eq!(g.u32("t.u8").unwrap(), 200);
    assert_eq!(g.u64("t.u64").unwrap(), u64::MAX);
    assert_eq!(g.f32("t.f64").unwrap(), 0.1);
    assert!(g.bool("t.bool").unwrap());
    assert_eq!(g.arr_u32("a.u16").unwrap(), [1, 65535]);
    assert_eq!(g.arr_i64("a.i8").unwrap(), [-1]);
    assert_eq!(g.arr_f32("a.f32").unwrap(), [0.5, -0.5]);
    assert_eq!(g.arr_str("a.str").unwrap(), ["a", "", "ß"]);
    assert_eq!(g.arr_f32("a.empty").unwrap(), [0f32; 0]);
    let data = sample_data();
    for (i, t) in g.tensors().iter().enumerate() {
        assert_eq!(g.data(t), data[i], "{}", t.name);
        assert_eq!(t.offset % g.alignment(), 0);
    }
    let y = g.tensor("y.weight").unwrap();
    assert_eq!((y.n_cols(), y.n_rows(), y.ty), (32, 2, GgmlType::Q8_0));
    assert_eq!(g.tensor("scalar").unwrap().n_elements(), 1);
    assert_eq!(g.tensor("none").unwrap().n_elements(), 0);
}

#[test]
fn memory_round_trip() {
    check_sample(&Gguf::from_bytes(sample_bytes()).unwrap());
}

#[test]
fn file_round_trip() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let mut sink = sample().create(&path, false).unwrap();
    let data = sample_data();
    sink.tensor("x.weight", &data[0]).unwrap();
    // y in ragged parts, running over into the scalar.
    sink.write_part(&data[1][..7]).unwrap();
    let rest = [&data[1][7..], &data[2]].concat();
    sink.write_part(&rest).unwrap();
    sink.tensor("none", &[]).unwrap();
    sink.tensor("z.weight", &data[4]).unwrap();
    assert!(!path.exists(), "nothing is in place before finish");
    sink.finish().unwrap();
    let g = Gguf::open(&path).unwrap();
    check_sample(&g);
    assert_eq!(std::fs::read(&path).unwrap(), sample_bytes());
    // Released pages come back with the same bytes.
    for t in g.tensors() {
        g.release(t);
    }
    check_sample(&g);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn release_gives_up_whole_pages() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let mut w = GgufWriter::new();
    w.tensor("big", &[1 << 16], GgmlType::F32).unwrap();
    let bytes: Vec<u8> = (0..1 << 18).map(|i| (i % 251) as u8).collect();
    let mut sink = w.create(&path, false).unwrap();
    sink.tensor("big", &bytes).unwrap();
    sink.finish().unwrap();
    let g = Gguf::open(&path).unwrap();
    let t = g.tensor("big").unwrap();
    assert_eq!(g.data(t), bytes);
    assert_eq!(g.release(t), (1 << 18) - 4096);
    assert_eq!(g.data(t), bytes);
}

#[test]
fn writer_refuses_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, b"old").unwrap();
    let err = sample().create(&path, false).err().unwrap();
    assert!(matches!(err.kind, ErrorKind::Exists), "{err}");

    // Order, size and missing data are errors; the old file stays as it was.
    let mut sink = sample().create(&path, true).unwrap();
    let err = sink.tensor("y.weight", &[]).unwrap_err();
    assert!(matches!(err.kind, ErrorKind::Order { .. }), "{err}");
    let err = sink.tensor("x.weight", &[0; 47]).unwrap_err();
    assert!(
        matches!(
            err.kind,
            ErrorKind::DataSize {
                expected: 48,
                got: 47,
                ..
            }
        ),
        "{err}"
    );
    sink.tensor("x.weight", &[0; 48]).unwrap();
    let err = sink.finish().unwrap_err();
    assert!(matches!(err.kind, ErrorKind::DataSize { .. }), "{err}");
    assert_eq!(std::fs::read(&path).unwrap(), b"old");

    // Overwriting replaces; a file that appears while writing is not lost.
    let mut w = GgufWriter::new();
    w.set("k", 1u32);
    w.create(&path, true).unwrap().finish().unwrap();
    assert_eq!(Gguf::open(&path).unwrap().u32("k").unwrap(), 1);
    let other = dir.path().join("n.gguf");
    let sink = GgufWriter::new().create(&other, false).unwrap();
    std::fs::write(&other, b"mine").unwrap();
    let err = sink.finish().unwrap_err();
    assert!(matches!(err.kind, ErrorKind::Exists), "{err}");
    assert_eq!(std::fs::read(&other).unwrap(), b"mine");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);

    let mut w = GgufWriter::new();
    w.tensor("a", &[4], GgmlType::F32).unwrap();
    assert!(w.tensor("a", &[4], GgmlType::F32).is_err());
    assert!(w.tensor("b", &[33], GgmlType::Q8_0).is_err());
    assert!(w.tensor("c", &[1, 1, 1, 1, 1], GgmlType::F32).is_err());
    assert!(w.tensor(&"d".repeat(64), &[1], GgmlType::F32).is_err());
    assert!(w.tensor("e", &[u64::MAX, 2], GgmlType::F32).is_err());
    w.set("general.alignment", 24u32);
    let err = w.to_bytes(&[&[0; 16]]).unwrap_err();
    assert!(matches!(err.kind, ErrorKind::Alignment { .. }), "{err}");
}

#[cfg(target_os = "linux")]
#[test]
fn unwritable_folder_is_an_error() {
    let err = sample()
        .create("/proc/nowhere/m.gguf".as_ref(), false)
        .err()
        .unwrap();
    assert!(matches!(err.kind, ErrorKind::Io(_)), "{err}");
    assert!(err.to_string().contains("/proc/nowhere/m.gguf"), "{err}");
}

#[test]
fn alignment_key_moves_the_data() {
    for alignment in [1u32, 8, 64, 4096] {
        let mut w = sample();
        w.set("general.alignment", alignment);
        let data = sample_data();
        let slices: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
        let g = Gguf::from_bytes(w.to_bytes(&slices).unwrap()).unwrap();
        assert_eq!(g.alignment(), u64::from(alignment));
        for (i, t) in g.tensors().iter().enumerate() {
            assert_eq!(t.offset % u64::from(alignment), 0);
            assert_eq!(g.data(t), data[i]);
        }
    }
}

#[test]
fn version_two_reads_and_others_are_named() {
    let mut bytes = sample_bytes();
    bytes[4] = 2;
    assert_eq!(Gguf::from_bytes(bytes.clone()).unwrap().version(), 2);
    bytes[4] = 1;
    assert!(matches!(kind(bytes.clone()), ErrorKind::VersionOne));
    bytes[4] = 4;
    assert!(matches!(kind(bytes.clone()), ErrorKind::Version { got: 4 }));
    bytes[4..8].copy_from_slice(&3u32.to_be_bytes());
    assert!(matches!(kind(bytes.clone()), ErrorKind::BigEndian { .. }));
    bytes[0] = b'X';
    assert!(matches!(kind(bytes), ErrorKind::Magic { .. }));
    assert!(matches!(kind(vec![]), ErrorKind::Truncated { .. }));
}

#[test]
fn getters_name_key_and_types() {
    let g = Gguf::from_bytes(sample_bytes()).unwrap();
    let text = |r: Error| r.to_string();
    let e = text(g.u32("t.text").unwrap_err());
    assert!(
        e.contains("t.text") && e.contains("u32") && e.contains("string"),
        "{e}"
    );
    let e = text(g.u32("t.i32").unwrap_err());
    assert!(e.contains("-7"), "{e}");
    assert!(text(g.u32("nope").unwrap_err()).contains("nope"));
    assert!(text(g.require_tensor("nope").unwrap_err()).contains("nope"));
    assert!(g.opt_u32("nope").unwrap().is_none());
    assert!(g.opt_arr_u32("a.i32").is_err());
    assert!(g.arr_f32("a.f64").is_err());
    assert!(matches!(
        g.get("a.bool"),
        Some(Value::Array(Array::Bool(_)))
    ));
}

fn split_part(no: u64, count: u64, n_total: i32, tensor: &str) -> Vec<u8> {
    let mut w = GgufWriter::new();
    if no == 0 {
        w.set("general.architecture", "llama");
    }
    w.set("split.no", no as u16)
        .set("split.count", count as u16)
        .set("split.tensors.count", n_total);
    w.tensor(tensor, &[2], GgmlType::F32).unwrap();
    w.to_bytes(&[&[no as u8; 8]]).unwrap()
}

#[test]
fn split_files() {
    let dir = tempfile::tempdir().unwrap();
    let at = |no| dir.path().join(split_name("m.Q8_0", no, 3));
    for no in 0..3 {
        std::fs::write(at(no), split_part(no, 3, 3, &format!("t{no}"))).unwrap();
    }
    let g = Gguf::open(&at(0)).unwrap();
    assert_eq!(g.n_parts(), 3);
    for (i, t) in g.tensors().iter().enumerate() {
        assert_eq!(g.data(t), [i as u8; 8]);
    }
    // Another part names the first.
    let e = Gguf::open(&at(1)).unwrap_err();
    assert!(e.to_string().contains("m.Q8_0-00001-of-00003.gguf"), "{e}");
    // Wrong name, wrong number of tensors, wrong part, doubled tensor, missing part.
    let lone = dir.path().join("lone.gguf");
    std::fs::copy(at(0), &lone).unwrap();
    assert!(matches!(
        Gguf::open(&lone).unwrap_err().kind,
        ErrorKind::SplitName { .. }
    ));
    std::fs::write(at(0), split_part(0, 3, 4, "t0")).unwrap();
    assert!(matches!(
        Gguf::open(&at(0)).unwrap_err().kind,
        ErrorKind::SplitTensors {
            expected: 4,
            got: 3
        }
    ));
    std::fs::write(at(2), split_part(1, 3, 3, "t2")).unwrap();
    assert!(matches!(
        Gguf::open(&at(0)).unwrap_err().kind,
        ErrorKind::Split { .. }
    ));
    std::fs::write(at(2), split_part(2, 3, 3, "t0")).unwrap();
    assert!(matches!(
        Gguf::open(&at(0)).unwrap_err().kind,
        ErrorKind::DuplicateTensor { .. }
    ));
    std::fs::remove_file(at(2)).unwrap();
    let e = Gguf::open(&at(0)).unwrap_err();
    assert!(e.to_string().contains("00003-of-00003"), "{e}");
}

#[test]
fn opening_what_is_no_file() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Gguf::open(dir.path()).is_err());
    assert!(Gguf::open(&dir.path().join("missing.gguf")).is_err());
    let empty = dir.path().join("empty.gguf");
    std::fs::write(&empty, b"").unwrap();
    assert!(matches!(
        Gguf::open(&empty).unwrap_err().kind,
        ErrorKind::Truncated { .. }
    ));
}

// The corpus of broken files.

fn kind(bytes: Vec<u8>) -> ErrorKind {
    Gguf::from_bytes(bytes).unwrap_err().kind
}

/// Reads everything a caller could read, if the bytes are accepted.
fn visit(bytes: Vec<u8>) {
    if let Ok(g) = Gguf::from_bytes(bytes) {
        for (key, value) in g.keys() {
            assert!(!key.is_empty());
            assert!(!value.to_string().is_empty());
        }
        for t in g.tensors() {
            assert_eq!(g.data(t).len() as u64, t.n_bytes);
            assert!(t.n_bytes <= g.n_bytes());
        }
    }
}

/// A header written by hand, for what the writer would refuse.
struct Raw(Vec<u8>);

impl Raw {
    fn new(n_tensors: u64, n_keys: u64) -> Raw {
        Raw(b"GGUF".to_vec()).u32(3).u64(n_tensors).u64(n_keys)
    }
    fn u32(mut self, v: u32) -> Raw {
        self.0.extend_from_slice(&v.to_le_bytes());
        self
    }
    fn u64(mut self, v: u64) -> Raw {
        self.0.extend_from_slice(&v.to_le_bytes());
        self
    }
    fn bytes(mut self, v: &[u8]) -> Raw {
        self.0.extend_from_slice(v);
        self
    }
    fn str(self, v: &str) -> Raw {
        self.u64(v.len() as u64).bytes(v.as_bytes())
    }
    fn tensor(self, name: &str, dims: &[u64], ty: u32, offset: u64) -> Raw {
        let mut r = self.str(name).u32(dims.len() as u32);
        for &d in dims {
            r = r.u64(d);
        }
        r.u32(ty).u64(offset)
    }
    /// Pads to 32 bytes and adds `n` bytes of data.
    fn data(mut self, n: usize) -> Vec<u8> {
        self.0.resize(self.0.len().next_multiple_of(32) + n, 0);
        self.0
    }
}

#[test]
fn absurd_counts() {
    let big = [1u64 << 20, 1 << 32, 1 << 62, u64::MAX / 24, u64::MAX];
    for n in big {
        assert!(
            matches!(kind(Raw::new(n, 0).data(0)), ErrorKind::Count { .. }),
            "{n}"
        );
        assert!(
            matches!(kind(Raw::new(0, n).data(0)), ErrorKind::Count { .. }),
            "{n}"
        );
        // A string and arrays of every type longer than the file.
        let text = Raw::new(0, 1).str("k").u32(8).u64(n).data(64);
        assert!(matches!(kind(text), ErrorKind::Truncated { .. }), "{n}");
        for ty in [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12] {
            let bytes = Raw::new(0, 1).str("k").u32(9).u32(ty).u64(n).data(64);
            assert!(
                matches!(kind(bytes), ErrorKind::Count { .. }),
                "{n} of type {ty}"
            );
        }
        let name = Raw::new(1, 0).u64(n).data(64);
        assert!(matches!(kind(name), ErrorKind::Truncated { .. }), "{n}");
    }
}

#[test]
fn broken_keys() {
    let dup = Raw::new(0, 2).str("k").u32(4).u32(1).str("k").u32(4).u32(2);
    assert!(matches!(kind(dup.data(0)), ErrorKind::DuplicateKey { key } if key == "k"));
    let empty = Raw::new(0, 1).str("").u32(4).u32(1);
    assert!(matches!(
        kind(empty.data(0)),
        ErrorKind::EmptyKey { index: 0 }
    ));
    for ty in [13, 99, u32::MAX] {
        let e = kind(Raw::new(0, 1).str("k").u32(ty).data(32));
        assert!(matches!(e, ErrorKind::ValueType { .. }), "{e}");
        let e = kind(Raw::new(0, 1).str("k").u32(9).u32(ty).u64(0).data(32));
        assert!(matches!(e, ErrorKind::ValueType { .. }), "{e}");
    }
    let nested = Raw::new(0, 1).str("k").u32(9).u32(9).u64(1).u32(4).u64(0);
    assert!(matches!(
        kind(nested.data(0)),
        ErrorKind::NestedArray { .. }
    ));
    let bool2 = Raw::new(0, 1).str("k").u32(7).bytes(&[2]);
    assert!(matches!(
        kind(bool2.data(0)),
        ErrorKind::Bool { got: 2, .. }
    ));
    let utf8 = Raw::new(0, 1).str("k").u32(8).u64(2).bytes(&[0xff, 0xfe]);
    assert!(matches!(kind(utf8.data(0)), ErrorKind::Utf8 { .. }));
    let long = Raw::new(0, 1).str(&"k".repeat(70000)).u32(4).u32(1);
    assert!(matches!(kind(long.data(0)), ErrorKind::NameTooLong { .. }));
    for alignment in [0u32, 3, 48] {
        let bytes = Raw::new(0, 1)
            .str("general.alignment")
            .u32(4)
            .u32(alignment);
        assert!(matches!(kind(bytes.data(0)), ErrorKind::Alignment { .. }));
    }
    let wide = Raw::new(0, 1).str("general.alignment").u32(10).u64(32);
    assert!(matches!(kind(wide.data(0)), ErrorKind::Alignment { .. }));
}

#[test]
fn broken_tensors() {
    let one = |dims: &[u64], ty, offset, n| Raw::new(1, 0).tensor("t", dims, ty, offset).data(n);
    assert!(Gguf::from_bytes(one(&[8], 0, 0, 32)).is_ok());
    assert!(matches!(
        kind(one(&[8], 0, 0, 31)),
        ErrorKind::OutOfBounds { .. }
    ));
    assert!(matches!(
        kind(one(&[8], 0, 32, 32)),
        ErrorKind::OutOfBounds { .. }
    ));
    assert!(matches!(
        kind(one(&[8], 0, 31, 99)),
        ErrorKind::Misaligned { got: 31, .. }
    ));
    assert!(matches!(
        kind(one(&[8], 0, u64::MAX - 31, 32)),
        ErrorKind::OutOfBounds { .. }
    ));
    assert!(matches!(
        kind(one(&[1; 5], 0, 0, 32)),
        ErrorKind::Dims { got: 5, .. }
    ));
    assert!(matches!(
        kind(one(&[33], 8, 0, 99)),
        ErrorKind::Row { expected: 32, .. }
    ));
    for ty in [4, 31, 36, 43, u32::MAX] {
        assert!(matches!(
            kind(one(&[32], ty, 0, 99)),
            ErrorKind::TensorType { .. }
        ));
    }
    for dims in [
        vec![u64::MAX],
        vec![1 << 62, 2],
        vec![1 << 32, 1 << 32],
        vec![0, u64::MAX, u64::MAX],
        vec![1 << 31, 1 << 31, 1 << 31],
    ] {
        let e = kind(one(&dims, 0, 0, 32));
        assert!(matches!(e, ErrorKind::TensorSize { .. }), "{dims:?}: {e}");
    }
    let two = |a, b| {
        Raw::new(2, 0)
            .tensor("a", &[16], 0, a)
            .tensor("b", &[8], 0, b)
            .data(128)
    };
    assert!(Gguf::from_bytes(two(32, 0)).is_ok());
    assert!(matches!(kind(two(0, 32)), ErrorKind::Overlap { .. }));
    assert!(matches!(kind(two(32, 32)), ErrorKind::Overlap { .. }));
    let dup = Raw::new(2, 0)
        .tensor("a", &[8], 0, 0)
        .tensor("a", &[8], 0, 32);
    assert!(matches!(
        kind(dup.data(64)),
        ErrorKind::DuplicateTensor { .. }
    ));
    // An empty tensor at the end of a file that lacks the padding.
    let mut empty = Raw::new(1, 0).tensor("t", &[0], 0, 0).0;
    empty.push(0);
    visit(empty);
}

#[test]
fn every_truncation_is_refused() {
    let bytes = sample_bytes();
    let whole = Gguf::from_bytes(bytes.clone()).unwrap();
    let last = whole.tensors().iter().map(|t| t.offset + t.n_bytes).max();
    for n in 0..bytes.len() {
        let result = Gguf::from_bytes(bytes[..n].to_vec());
        // Only the padding after the last tensor may be missing.
        assert_eq!(result.is_ok(), n as u64 >= last.unwrap(), "{n} bytes");
    }
}

#[test]
fn every_byte_wrong() {
    let bytes = sample_bytes();
    for at in 0..bytes.len() {
        for value in [
            0,
            1,
            0x7f,
            0x80,
            0xff,
            bytes[at] ^ 1,
            bytes[at].wrapping_add(1),
        ] {
            let mut broken = bytes.clone();
            broken[at] = value;
            visit(broken);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_mutations(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
                        cut in any::<prop::sample::Index>()) {
        let mut bytes = sample_bytes();
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes.truncate(cut.index(bytes.len()) + bytes.len() / 2);
        visit(bytes);
    }

    #[test]
    fn random_bytes(tail in prop::collection::vec(any::<u8>(), 0..400)) {
        visit([b"GGUF\x03\0\0\0".as_slice(), &tail].concat());
        visit(tail);
    }

    #[test]
    fn written_is_read(keys in prop::collection::btree_map("[a-z.]{1,20}", prop::collection::vec(any::<i32>(), 0..20), 0..8),
                       rows in 0u64..5, text in "\\PC*") {
        let mut w = GgufWriter::new();
        for (key, v) in &keys {
            w.set(&format!("k{key}"), v.clone());
        }
        w.set("text", text.as_str());
        w.tensor("t", &[32, rows], GgmlType::Q4_0).unwrap();
        let data = vec![5u8; rows as usize * 18];
        let g = Gguf::from_bytes(w.to_bytes(&[&data]).unwrap()).unwrap();
        prop_assert_eq!(g.keys(), w.keys());
        prop_assert_eq!(g.data(&g.tensors()[0]), data);
    }
}
