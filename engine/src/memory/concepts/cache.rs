//! Where compressed segments are kept to be used again: by content, in this process, and behind that in a
//! folder or in a Redis server that several machines share.
//!
//! A segment's embeddings follow from the model, its compressor and the segment's tokens alone, so
//! that what is found under a key never gets old. A store that fails costs time, not answers: it is
//! reported (`tracing`), and the segment is compressed again.

use crate::error::{Error, Result};
use crate::session::{Decoder, Encoder};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// Bytes of embeddings that a process keeps at hand.
const RAM_BYTES: usize = 256 << 20;
/// Bytes that a folder is brought down to when it is opened, the longest unused going first.
const FOLDER_BYTES: u64 = 2 << 30;
/// Longest wait for a Redis server, to connect and to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// After a failure the server is left alone for so long.
const PAUSE: Duration = Duration::from_secs(30);
/// First bytes of a stored entry; other layouts get others.
const MAGIC: [u8; 8] = *b"mnemece\x01";

/// SHA-256 of the model's identity, the number of embeddings and the segment's tokens.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key([u8; 32]);

impl Key {
    /// The key of `n_slots` embeddings of `tokens` by the compressor of the model (and its adapter) with this
    /// [`crate::Model::identity`].
    pub fn new(identity: u64, tokens: &[u32], n_slots: usize) -> Key {
        let mut hash = Sha256::new();
        hash.update(MAGIC);
        hash.update(identity.to_le_bytes());
        hash.update((n_slots as u64).to_le_bytes());
        for id in tokens {
            hash.update(id.to_le_bytes());
        }
        Key(hash.finalize().into())
    }

    fn hex(self) -> String {
        self.0.iter().fold(String::new(), |mut s, byte| {
            let _ = write!(s, "{byte:02x}");
            s
        })
    }
}

/// Compressed segments by content.
pub struct ConceptCache {
    near: Mutex<Near>,
    far: Far,
    found: AtomicU64,
    made: AtomicU64,
}

/// What the process has at hand.
#[derive(Default)]
struct Near {
    entries: HashMap<Key, (Arc<[f32]>, u64)>,
    bytes: usize,
    /// Counts uses.
    clock: u64,
}

/// What lies behind.
enum Far {
    Nothing,
    Folder(PathBuf),
    Redis(Box<Redis>),
}

struct Redis {
    client: redis::Client,
    /// Shown in messages: without a password.
    name: String,
    state: Mutex<RedisState>,
}

#[derive(Default)]
struct RedisState {
    connection: Option<redis::Connection>,
    /// Not asked again before.
    rest_until: Option<SystemTime>,
}

impl Default for ConceptCache {
    /// In this process alone.
    fn default() -> ConceptCache {
        ConceptCache {
            near: Mutex::default(),
            far: Far::Nothing,
            found: AtomicU64::new(0),
            made: AtomicU64::new(0),
        }
    }
}

impl ConceptCache {
    /// The cache at `place`: the URL of a Redis server (`redis://host:port/db`), or a folder, which is made.
    pub fn open(place: &str) -> Result<ConceptCache> {
        let far = match place.split_once("://") {
            Some(("redis" | "rediss" | "unix" | "redis+unix", _)) => {
                let client = redis::Client::open(place).map_err(|e| Error::ConceptCache {
                    place: without_password(place),
                    what: e.to_string(),
                })?;
                Far::Redis(Box::new(Redis {
                    client,
                    name: without_password(place),
                    state: Mutex::default(),
                }))
            }
            Some((scheme, _)) => {
                return Err(Error::ConceptCache {
                    place: without_password(place),
                    what: format!("`{scheme}://` is neither redis:// nor a folder"),
                });
            }
            None => {
                let folder = PathBuf::from(place);
                let io = |source| Error::Io {
                    path: folder.clone(),
                    source,
                };
                fs::create_dir_all(&folder).map_err(io)?;
                shrink(&folder).map_err(io)?;
                Far::Folder(folder)
            }
        };
        Ok(ConceptCache {
            far,
            ..ConceptCache::default()
        })
    }

    /// Segments that were found here so far, and those that had to be made.
    pub fn counts(&self) -> (u64, u64) {
        let read = |n: &AtomicU64| n.load(Ordering::Relaxed);
        (read(&self.found), read(&self.made))
    }

    /// The embeddings under `key`, `len` numbers.
    pub fn get(&self, key: Key, len: usize) -> Option<Arc<[f32]>> {
        let found = self.find(key, len);
        if found.is_some() {
            self.found.fetch_add(1, Ordering::Relaxed);
        }
        found
    }

    fn find(&self, key: Key, len: usize) -> Option<Arc<[f32]>> {
        {
            let mut near = lock(&self.near);
            near.clock += 1;
            let now = near.clock;
            if let Some((found, used)) = near.entries.get_mut(&key) {
                *used = now;
                return Some(Arc::clone(found));
            }
        }
        let bytes = match &self.far {
            Far::Nothing => return None,
            Far::Folder(folder) => {
                let path = folder.join(key.hex());
                let bytes = fs::read(&path).ok()?;
                // What was used stays when the folder is made smaller.
                if let Ok(file) = fs::File::options().append(true).open(&path) {
                    let _ = file.set_modified(SystemTime::now());
                }
                bytes
            }
            Far::Redis(redis) => redis.ask(|connection| {
                redis::cmd("GET")
                    .arg(name(key))
                    .query::<Option<Vec<u8>>>(connection)
            })??,
        };
        match decode(&bytes, len) {
            Ok(found) => {
                self.keep(key, &found);
                Some(found)
            }
            Err(e) => {
                tracing::warn!("concept cache: entry {}: {e}", key.hex());
                None
            }
        }
    }

    /// Keeps embeddings under their key.
    pub fn put(&self, key: Key, embeddings: &Arc<[f32]>) {
        self.made.fetch_add(1, Ordering::Relaxed);
        self.keep(key, embeddings);
        let bytes = encode(embeddings);
        match &self.far {
            Far::Nothing => {}
            Far::Folder(folder) => {
                if let Err(e) = write(folder, &key.hex(), &bytes) {
                    tracing::warn!("concept cache: {}: {e}", folder.display());
                }
            }
            Far::Redis(redis) => {
                let _ = redis.ask(|connection| {
                    redis::cmd("SET")
                        .arg(name(key))
                        .arg(&bytes)
                        .query::<()>(connection)
                });
            }
        }
    }

    fn keep(&self, key: Key, embeddings: &Arc<[f32]>) {
        let mut near = lock(&self.near);
        near.clock += 1;
        let entry = (Arc::clone(embeddings), near.clock);
        if near.entries.insert(key, entry).is_none() {
            near.bytes += size_of_val(&embeddings[..]);
        }
        if near.bytes <= RAM_BYTES {
            return;
        }
        // The longer unused half goes, so that this is rare.
        let mut uses: Vec<u64> = near.entries.values().map(|(_, used)| *used).collect();
        let middle = uses.len() / 2;
        let (_, &mut median, _) = uses.select_nth_unstable(middle);
        near.entries.retain(|_, (_, used)| *used > median);
        near.bytes = near
            .entries
            .values()
            .map(|(e, _)| size_of_val(&e[..]))
            .sum();
    }
}

impl Redis {
    /// Asks the server; `None` when it cannot be reached or refuses.
    fn ask<T>(&self, f: impl FnOnce(&mut redis::Connection) -> redis::RedisResult<T>) -> Option<T> {
        let mut state = lock(&self.state);
        if state.rest_until.is_some_and(|t| SystemTime::now() < t) {
            return None;
        }
        let answer = || {
            let connection = match &mut state.connection {
                Some(connection) => connection,
                none => {
                    let new = self.client.get_connection_with_timeout(PATIENCE)?;
                    new.set_read_timeout(Some(PATIENCE))?;
                    new.set_write_timeout(Some(PATIENCE))?;
                    none.insert(new)
                }
            };
            f(connection)
        };
        match answer() {
            Ok(answer) => Some(answer),
            Err(e) => {
                tracing::warn!("concept cache: {}: {e}", self.name);
                state.connection = None;
                state.rest_until = Some(SystemTime::now() + PAUSE);
                None
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A URL as it may be shown.
fn without_password(place: &str) -> String {
    match (place.split_once("://"), place.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://{host}"),
        _ => place.into(),
    }
}

/// The name of an entry among other things in a Redis server.
fn name(key: Key) -> String {
    format!("mneme:concepts:{}", key.hex())
}

fn encode(embeddings: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(embeddings.len() * 4 + 20);
    let mut out = Encoder::new(&mut bytes);
    let written = out
        .bytes(&MAGIC)
        .and_then(|()| out.f32s(embeddings))
        .and_then(|()| out.finish());
    written.expect("memory takes whatever is written");
    bytes
}

fn decode(bytes: &[u8], len: usize) -> std::io::Result<Arc<[f32]>> {
    let mut reader = bytes;
    let mut from = Decoder::new(&mut reader, bytes.len() as u64);
    let mut magic = [0; 8];
    from.bytes_into(&mut magic)?;
    if magic != MAGIC {
        return Err(std::io::Error::other("not a compressed segment"));
    }
    let mut embeddings = vec![0.0; len];
    from.f32s_into(&mut embeddings)?;
    from.finish()?;
    Ok(embeddings.into())
}

/// Writes an entry beside its name and renames it, as every file that others may read meanwhile.
fn write(folder: &Path, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = tempfile::Builder::new().prefix(".").tempfile_in(folder)?;
    std::io::Write::write_all(&mut file, bytes)?;
    file.persist(folder.join(name)).map_err(|e| e.error)?;
    Ok(())
}

/// Brings a folder's entries down to [`FOLDER_BYTES`]. Files of other names are left alone.
fn shrink(folder: &Path) -> std::io::Result<()> {
    let is_entry = |name: &str| name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit());
    let mut entries = Vec::new();
    let mut total = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(is_entry)
            && let Ok(meta) = entry.metadata()
        {
            total += meta.len();
            entries.push((meta.modified()?, meta.len(), entry.path()));
        }
    }
    entries.sort();
    for (_, len, path) in entries {
        if total <= FOLDER_BYTES {
            break;
        }
        if fs::remove_file(path).is_ok() {
            total -= len;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(n: usize) -> Arc<[f32]> {
        (0..n).map(|i| i as f32 * 0.5 - 3.0).collect()
    }

    #[test]
    fn keys_tell_models_tokens_and_sizes_apart() {
        let key = Key::new(1, &[1, 2, 3], 2);
        assert!(key == Key::new(1, &[1, 2, 3], 2));
        for other in [
            Key::new(2, &[1, 2, 3], 2),
            Key::new(1, &[1, 2, 4], 2),
            Key::new(1, &[1, 2], 2),
            Key::new(1, &[1, 2, 3], 1),
        ] {
            assert!(key != other);
        }
    }

    #[test]
    fn a_folder_gives_back_what_it_was_given_and_nothing_broken() {
        let folder = tempfile::tempdir().expect("a folder");
        let place = folder.path().join("new").display().to_string();
        let key = Key::new(7, &[5, 6], 1);
        let cache = ConceptCache::open(&place).expect("a new folder");
        assert!(cache.get(key, 12).is_none());
        cache.put(key, &some(12));
        assert_eq!(cache.get(key, 12).as_deref(), Some(&some(12)[..]));

        let again = || ConceptCache::open(&place).expect("the folder");
        assert_eq!(again().get(key, 12).as_deref(), Some(&some(12)[..]));
        assert!(again().get(key, 13).is_none(), "of another width");
        let path = Path::new(&place).join(key.hex());
        let whole = fs::read(&path).expect("the entry");
        for n in [0, 7, 8, 20, whole.len() - 1] {
            fs::write(&path, &whole[..n]).expect("written");
            assert!(again().get(key, 12).is_none(), "{n} bytes of it");
        }
        let mut flipped = whole;
        flipped[30] ^= 1;
        fs::write(&path, flipped).expect("written");
        assert!(again().get(key, 12).is_none(), "a bit of it changed");
    }

    #[test]
    fn places_that_cannot_be_are_refused_in_words() {
        let Err(e) = ConceptCache::open("http://somewhere") else {
            panic!("no such store")
        };
        assert!(e.to_string().contains("redis://"), "{e}");
        assert_eq!(
            without_password("redis://me:secret@host:1/0"),
            "redis://host:1/0"
        );
    }

    /// A server that is not there costs one try, then the cache works without it.
    #[test]
    fn a_server_that_is_away_is_left_alone() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = free.local_addr().expect("its number").port();
        drop(free);
        let cache = ConceptCache::open(&format!("redis://127.0.0.1:{port}/")).expect("a URL");
        let key = Key::new(7, &[5, 6], 1);
        assert!(cache.get(key, 4).is_none());
        cache.put(key, &some(4));
        assert_eq!(cache.get(key, 4).as_deref(), Some(&some(4)[..]));
    }

    /// Two caches that share a server, which here keeps what it is told in the way that Redis' protocol
    /// (RESP2) says.
    #[test]
    fn a_server_is_shared() {
        use std::io::{BufRead, BufReader, Read, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("its number").port();
        std::thread::spawn(move || {
            let kept = Arc::new(Mutex::new(HashMap::<Vec<u8>, Vec<u8>>::new()));
            for stream in listener.incoming() {
                let mut out = stream.expect("a client");
                let kept = Arc::clone(&kept);
                std::thread::spawn(move || {
                    let mut from = BufReader::new(out.try_clone().expect("the same"));
                    let line = |from: &mut BufReader<_>| {
                        let mut line = String::new();
                        from.read_line(&mut line).ok().filter(|&n| n > 0)?;
                        line.trim_end()[1..].parse::<usize>().ok()
                    };
                    while let Some(n) = line(&mut from) {
                        let mut args = Vec::new();
                        for _ in 0..n {
                            let len = line(&mut from).expect("a length");
                            let mut arg = vec![0; len + 2];
                            from.read_exact(&mut arg).expect("an argument");
                            arg.truncate(len);
                            args.push(arg);
                        }
                        let mut kept = lock(&kept);
                        let answer = match &args[..] {
                            [get, key] if get == b"GET" => match kept.get(key) {
                                Some(value) => {
                                    let mut bulk = format!("${}\r\n", value.len()).into_bytes();
                                    bulk.extend_from_slice(value);
                                    bulk.extend_from_slice(b"\r\n");
                                    bulk
                                }
                                None => b"$-1\r\n".to_vec(),
                            },
                            [set, key, value] if set == b"SET" => {
                                kept.insert(key.clone(), value.clone());
                                b"+OK\r\n".to_vec()
                            }
                            _ => b"+OK\r\n".to_vec(),
                        };
                        out.write_all(&answer).expect("the client waits");
                    }
                });
            }
        });
        let url = format!("redis://127.0.0.1:{port}/");
        let [mine, theirs] = [0, 1].map(|_| ConceptCache::open(&url).expect("a URL"));
        let key = Key::new(7, &[5, 6], 1);
        assert!(theirs.get(key, 4).is_none());
        mine.put(key, &some(4));
        assert_eq!(theirs.get(key, 4).as_deref(), Some(&some(4)[..]));
    }
}
