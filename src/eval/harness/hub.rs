//! Datasets of the Hugging Face hub: the parquet files that the hub makes of every dataset, kept by revision.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::checkpoint::write_atomic;
use crate::{Error, Result};

/// The branch where the hub keeps what it converted.
const BRANCH: &str = "refs%2Fconvert%2Fparquet";
const ATTEMPTS: u32 = 3;

/// A hub and a folder for what was downloaded from it.
#[derive(Debug, Clone)]
pub struct Hub {
    pub endpoint: String,
    /// Sent as a bearer token.
    pub token: Option<String>,
    /// Never ask the hub, take what is kept.
    pub offline: bool,
    pub folder: PathBuf,
}

/// What the hub says of a dataset's revision.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

impl Hub {
    /// As Hugging Face's own tools are told: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`.
    pub fn from_env(folder: PathBuf) -> Self {
        let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let endpoint = var("HF_ENDPOINT").unwrap_or("https://huggingface.co".into());
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: var("HF_TOKEN"),
            offline: var("HF_HUB_OFFLINE").is_some_and(|v| v != "0"),
            folder,
        }
    }

    /// The parquet files of a split, downloaded unless they are kept already, and the revision they are of.
    /// `config` `*` is every configuration of the dataset.
    ///
    /// # Errors
    /// Names the dataset and what the hub said.
    pub fn files(
        &self,
        dataset: &str,
        config: &str,
        split: &str,
    ) -> Result<(Vec<PathBuf>, String)> {
        let home = self.folder.join(dataset.replace('/', "--"));
        let listing = self.listing(dataset, &home.join("revision.json"))?;
        let mut files = Vec::new();
        for Sibling { rfilename } in &listing.siblings {
            // CONFIG/SPLIT/0000.parquet
            let parts: Vec<&str> = rfilename.split('/').collect();
            let [of_config, of_split, name] = parts[..] else {
                continue;
            };
            let plain = !parts
                .iter()
                .any(|p| p.is_empty() || p.contains("..") || p.contains('\\'));
            let wanted = (config == "*" || of_config == config) && of_split == split;
            if !plain || !wanted || !name.ends_with(".parquet") {
                continue;
            }
            let path = home.join(&listing.sha).join(rfilename);
            if !path.exists() {
                let url = format!(
                    "{}/datasets/{dataset}/resolve/{}/{rfilename}",
                    self.endpoint, listing.sha
                );
                let parent = path.parent().unwrap_or(&home);
                fs::create_dir_all(parent).map_err(Error::io("cannot make", parent))?;
                tracing::info!("downloading {url}");
                write_atomic(&path, &self.get(dataset, &url)?)?;
            }
            files.push(path);
        }
        files.sort();
        if files.is_empty() {
            return Err(Error::invalid(format!(
                "the hub has no parquet file of dataset {dataset}, configuration {config}, split {split}"
            )));
        }
        Ok((files, listing.sha))
    }

    /// The newest revision; the last one that was seen if the hub cannot be asked.
    fn listing(&self, dataset: &str, kept: &PathBuf) -> Result<Listing> {
        let url = format!("{}/api/datasets/{dataset}/revision/{BRANCH}", self.endpoint);
        let read = |bytes: &[u8]| -> Result<Listing> {
            let listing: Listing = serde_json::from_slice(bytes).map_err(|e| {
                Error::invalid(format!(
                    "dataset {dataset}: {url} is no listing of files: {e}"
                ))
            })?;
            match listing.sha.chars().all(|c| c.is_ascii_alphanumeric()) {
                true => Ok(listing),
                false => Err(Error::invalid(format!(
                    "dataset {dataset}: sha {}",
                    listing.sha
                ))),
            }
        };
        let asked = match self.offline {
            true => Err(Error::invalid(format!(
                "dataset {dataset} is not in {} and HF_HUB_OFFLINE is set",
                self.folder.display()
            ))),
            false => self.get(dataset, &url),
        };
        match (asked, fs::read(kept)) {
            (Ok(bytes), _) => {
                let listing = read(&bytes)?;
                let parent = kept.parent().unwrap_or(&self.folder);
                fs::create_dir_all(parent).map_err(Error::io("cannot make", parent))?;
                write_atomic(kept, &bytes)?;
                Ok(listing)
            }
            (Err(error), Ok(before)) => {
                if !self.offline {
                    tracing::warn!("{error}; taking the revision seen last");
                }
                read(&before)
            }
            (Err(error), Err(_)) => Err(error),
        }
    }

    fn get(&self, dataset: &str, url: &str) -> Result<Vec<u8>> {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_global(Some(Duration::from_secs(900)))
            .user_agent(concat!("zebroid/", env!("CARGO_PKG_VERSION")))
            .build()
            .into();
        let mut attempt = 1;
        loop {
            let mut request = agent.get(url);
            if let Some(token) = &self.token {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            let body = request.call().and_then(|mut response| {
                let body = response.body_mut().with_config().limit(1 << 32);
                body.read_to_vec()
            });
            let refused = matches!(&body, Err(ureq::Error::StatusCode(code)) if *code < 500);
            match body {
                Ok(bytes) => return Ok(bytes),
                Err(_) if !refused && attempt < ATTEMPTS => {
                    std::thread::sleep(Duration::from_millis(200 << attempt));
                    attempt += 1;
                }
                Err(error) => {
                    return Err(Error::invalid(format!(
                        "dataset {dataset} cannot be downloaded ({url}: {error}); set HF_TOKEN if it is gated, HF_ENDPOINT \
                         for another hub, or give its files with --data-dir"
                    )));
                }
            }
        }
    }
}
