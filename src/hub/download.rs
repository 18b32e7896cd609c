//! One file: what has come stays where a break or a kill leaves it (`blobs/ETAG.incomplete`), and it becomes a blob when it is the one
//! that was announced.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::cache::make_parent;
use super::http::{ATTEMPTS, Ask, Client, Failure, Patience, header};
use crate::Error;
use crate::watch::Watch;

/// A file as the hub announces it.
#[derive(Debug, Clone)]
pub(super) struct Announced {
    /// Path in its repository.
    pub file: String,
    pub url: String,
    pub etag: String,
    pub size: u64,
}

/// What an etag is a checksum of.
enum Sum {
    /// Large files.
    Sha256(Sha256),
    /// Others, as git names their content.
    Git(Sha1),
    /// Of another server, which says no more than the size.
    None,
}

impl Sum {
    fn of(announced: &Announced) -> Self {
        let hex = announced.etag.bytes().all(|b| b.is_ascii_hexdigit());
        match announced.etag.len() {
            64 if hex => Sum::Sha256(Sha256::new()),
            40 if hex => Sum::Git(Sha1::new().chain_update(format!("blob {}\0", announced.size))),
            _ => Sum::None,
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        match self {
            Sum::Sha256(sum) => sum.update(bytes),
            Sum::Git(sum) => sum.update(bytes),
            Sum::None => {}
        }
    }

    /// None: nobody can know.
    fn hex(self) -> Option<String> {
        match self {
            Sum::Sha256(sum) => Some(format!("{:x}", sum.finalize())),
            Sum::Git(sum) => Some(format!("{:x}", sum.finalize())),
            Sum::None => None,
        }
    }
}

/// What has come of a file.
struct Partial<'a> {
    file: File,
    path: &'a Path,
    bytes: u64,
    sum: Sum,
}

impl<'a> Partial<'a> {
    /// What an earlier attempt left; it is read once for its checksum.
    fn open(path: &'a Path, announced: &Announced) -> Result<Self, Error> {
        make_parent(path)?;
        let mut options = File::options();
        let file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path);
        let mut partial = Self {
            file: file.map_err(Error::io("cannot write", path))?,
            path,
            bytes: 0,
            sum: Sum::of(announced),
        };
        let mut buffer = vec![0; BUFFER];
        loop {
            let read = partial.file.read(&mut buffer);
            let read = read.map_err(Error::io("cannot read", path))?;
            if read == 0 {
                break;
            }
            partial.sum.add(&buffer[..read]);
            partial.bytes += read as u64;
        }
        if partial.bytes > announced.size {
            partial.clear(announced)?;
        }
        Ok(partial)
    }

    fn clear(&mut self, announced: &Announced) -> Result<(), Error> {
        let cleared = self.file.set_len(0);
        let cleared = cleared.and_then(|()| self.file.seek(SeekFrom::Start(0)));
        cleared.map_err(Error::io("cannot write", self.path))?;
        (self.bytes, self.sum) = (0, Sum::of(announced));
        Ok(())
    }

    fn add(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all(bytes).map_err(|error| {
            let error = match error.kind() {
                kind @ (io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                    io::Error::new(kind, FULL)
                }
                _ => error,
            };
            Error::io("cannot write", self.path)(error)
        })?;
        self.sum.add(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}

const BUFFER: usize = 1 << 18;
const FULL: &str = "the disk is full. What has come is kept: make room, or move the cache to another disk and name it with HF_HUB_CACHE, and \
    run the same command again";

/// Makes `blob` the announced file. `told` hears how many bytes of it are there.
pub(super) fn download(
    client: &Client,
    announced: &Announced,
    blob: &Path,
    told: &(dyn Fn(u64) + Sync),
    watch: &dyn Watch,
) -> Result<(), Failure> {
    let mut name = blob.as_os_str().to_owned();
    name.push(".incomplete");
    let path = Path::new(&name);
    let mut damaged = None;
    // What an earlier attempt left may be what is wrong: once more from the beginning.
    for _ in 0..2 {
        let mut partial = Partial::open(path, announced)?;
        let resumed = partial.bytes > 0;
        receive(client, announced, &mut partial, told, watch)?;
        let synced = partial.file.sync_all();
        synced.map_err(Error::io("cannot write", path))?;
        match partial.sum.hex() {
            Some(found) if found != announced.etag => {
                fs::remove_file(path).map_err(Error::io("cannot remove", path))?;
                damaged = Some(found);
            }
            _ => {
                return fs::rename(path, blob)
                    .map_err(|e| Error::io("cannot write", blob)(e).into());
            }
        }
        if !resumed {
            break;
        }
    }
    Err(Failure::Here(Error::invalid(format!(
        "{}: what came is damaged (checksum {}, announced was {}) and is not kept; run the same command again, or name another hub with \
         HF_ENDPOINT",
        announced.url,
        damaged.unwrap_or_default(),
        announced.etag
    ))))
}

/// All bytes that are missing, over as many connections as it takes, as long as each brings some.
fn receive(
    client: &Client,
    announced: &Announced,
    partial: &mut Partial,
    told: &(dyn Fn(u64) + Sync),
    watch: &dyn Watch,
) -> Result<(), Failure> {
    let mut buffer = vec![0; BUFFER];
    let (mut farthest, mut in_vain) = (partial.bytes, 0);
    told(partial.bytes);
    while partial.bytes < announced.size {
        let ask = Ask {
            url: &announced.url,
            head: false,
            from: partial.bytes,
            patience: Patience::Long,
        };
        let response = client.send(ask, watch)?;
        let goes_on = response.status().as_u16() == 206
            && header(&response, "content-range")
                .is_some_and(|range| range.starts_with(&format!("bytes {}-", partial.bytes)));
        if partial.bytes > 0 && !goes_on {
            partial.clear(announced)?;
        }
        let refused = !response.status().is_success();
        let mut body = response.into_body().into_reader();
        let why = loop {
            if refused {
                break "it has no such part".to_owned();
            }
            if watch.stop() {
                return Err(Failure::Interrupted);
            }
            match body.read(&mut buffer) {
                Ok(0) => break "the connection was cut".to_owned(),
                Ok(read) if partial.bytes + read as u64 > announced.size => {
                    partial.clear(announced)?;
                    break format!("more than the announced {} bytes came", announced.size);
                }
                Ok(read) => partial.add(&buffer[..read])?,
                Err(error) => break error.to_string(),
            }
            told(partial.bytes);
            if partial.bytes == announced.size {
                return Ok(());
            }
        };
        // A hub that cannot go on begins anew, and gets no farther.
        in_vain = match partial.bytes > farthest {
            true => 1,
            false => in_vain + 1,
        };
        farthest = farthest.max(partial.bytes);
        if in_vain >= ATTEMPTS {
            return Err(Failure::Unreachable(format!(
                "{why} after {} of {} bytes, which are kept",
                partial.bytes, announced.size
            )));
        }
        tracing::info!(
            "{}: {why}; going on at byte {}",
            announced.url,
            partial.bytes
        );
        client.wait(in_vain, None, watch)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_is_called_one() {
        let path = Path::new("/dev/full");
        let mut partial = Partial {
            file: File::options().write(true).open(path).unwrap(),
            path,
            bytes: 0,
            sum: Sum::None,
        };
        let error = partial.add(b"x").unwrap_err();
        assert_eq!(error.exit_code(), 1);
        let said = error.to_string();
        assert!(
            said.contains("the disk is full") && said.contains("HF_HUB_CACHE"),
            "{said}"
        );
    }
}
