//! Downloads from a hub that fails in all ways, into a cache that Hugging Face's own tools share.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};

use super::fake_tests::{COMMIT, FakeHub, Faults, etag, git, sha256};
use super::{Hub, Id, Part};
use crate::Error;
use crate::watch::{Quiet, Watch};

const CONFIG: &[u8] = b"{\"hidden_size\": 8}";
const MIB: usize = 1 << 20;

fn id(text: &str) -> Id {
    let said = Path::new(text);
    Id::model(said).unwrap().unwrap()
}

/// Large enough to come in several pieces.
fn weights() -> Vec<u8> {
    (0..3 * MIB + 11).map(|i| ((i * i) >> 7) as u8).collect()
}

fn whole(hub: &Hub, text: &str) -> Result<PathBuf, Error> {
    hub.model(&id(text), Part::Whole, &Quiet::default())
}

fn refusal(hub: &Hub, text: &str) -> (u8, String) {
    let error = whole(hub, text).unwrap_err();
    (error.exit_code(), error.to_string())
}

#[test]
fn a_model_comes_into_the_shared_cache_once() {
    let weights = weights();
    let fake = FakeHub::with(
        "org/model",
        &[
            ("config.json", CONFIG),
            ("tokenizer.json", b"{}"),
            ("model.safetensors", &weights),
            ("pytorch_model.bin", b"no"),
            ("original/params.json", b"no"),
            ("onnx/model.safetensors", b"no"),
        ],
    );
    let cache = tempfile::tempdir().unwrap();
    let hub = fake.hub(cache.path());
    // Sizes alone.
    let config = hub.model(&id("org/model"), Part::Config, &Quiet::default());
    assert!(!config.unwrap().join("tokenizer.json").exists());
    assert_eq!(fake.downloads(), 1);
    let folder = whole(&hub, "org/model").unwrap();
    assert_eq!(fake.downloads(), 2);
    let repo = cache.path().join("models--org--model");
    assert_eq!(folder, repo.join("snapshots").join(COMMIT));
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights);
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    let mut blobs: Vec<String> = fs::read_dir(repo.join("blobs"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    blobs.sort();
    let mut wanted = [sha256(&weights), git(CONFIG), git(b"{}")];
    wanted.sort();
    assert_eq!(blobs, wanted);
    #[cfg(unix)]
    assert_eq!(
        fs::read_link(folder.join("config.json")).unwrap(),
        Path::new("../../blobs").join(git(CONFIG))
    );
    // Once more: one question, and of a commit none.
    whole(&hub, "org/model").unwrap();
    assert_eq!(fake.asked().len(), 1);
    whole(&hub, &format!("hf://org/model@{COMMIT}")).unwrap();
    assert_eq!(fake.asked().len(), 0);
}

#[test]
fn sharded_weights_are_those_of_the_index() {
    let index = br#"{"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-1.safetensors"}}"#;
    let files: [(&str, &[u8]); 5] = [
        ("config.json", CONFIG),
        ("model.safetensors.index.json", index),
        ("model-1.safetensors", b"one"),
        ("model-2.safetensors", b"two"),
        ("consolidated.safetensors", b"both"),
    ];
    let fake = FakeHub::with("org/model", &files);
    let cache = tempfile::tempdir().unwrap();
    let hub = fake.hub(cache.path());
    let folder = whole(&hub, "org/model").unwrap();
    assert!(!folder.join("consolidated.safetensors").exists());
    // What is not all there is not taken for it.
    fs::remove_file(folder.join("model-2.safetensors")).unwrap();
    let offline = Hub {
        offline: true,
        ..hub
    };
    let (code, said) = refusal(&offline, "org/model");
    assert!(
        code == 1
            && said.contains("without its model-2.safetensors")
            && said.contains("HF_HUB_OFFLINE"),
        "{said}"
    );
}

#[test]
fn cut_and_killed_downloads_go_on_where_they_were() {
    let weights = weights();
    let files: [(&str, &[u8]); 2] = [("config.json", CONFIG), ("model.safetensors", &weights)];
    let fake = FakeHub::with("org/model", &files);
    let cache = tempfile::tempdir().unwrap();
    let hub = fake.hub(cache.path());
    fake.fail(Faults {
        cut: vec![MIB, MIB + 5],
        busy: 2,
        ..Faults::default()
    });
    let folder = whole(&hub, "org/model").unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights);
    let ranges: Vec<_> = fake
        .asked()
        .into_iter()
        .filter(|a| a.line.contains("/cdn/"))
        .collect();
    let ranges: Vec<_> = ranges.iter().map(|a| a.range.as_deref()).collect();
    let (first, second) = (format!("bytes={MIB}-"), format!("bytes={}-", 2 * MIB + 5));
    assert_eq!(ranges, [None, Some(first.as_str()), Some(second.as_str())]);

    // Ctrl-C: what came is kept, and comes no more.
    struct Stops(Cell<bool>);
    impl Watch for Stops {
        fn start(&self, stage: &str, all: usize) {
            assert_eq!((stage, all), ("download org/model", 4));
        }
        fn at(&self, _: usize, note: &str) {
            self.0.set(note.contains("model.safetensors"));
        }
        fn note(&self, _: &str) {}
        fn stop(&self) -> bool {
            self.0.get()
        }
    }
    let cache = tempfile::tempdir().unwrap();
    let hub = fake.hub(cache.path());
    fake.fail(Faults {
        slow: true,
        ..Faults::default()
    });
    let stopped = hub.model(&id("org/model"), Part::Whole, &Stops(Cell::new(false)));
    let stopped = stopped.unwrap_err();
    assert_eq!(stopped.exit_code(), 130);
    let said = stopped.to_string();
    assert!(
        ["1", "2"].map(|n| said.contains(&format!("{n} of 4 MiB of org/model are kept in")))
            != [false; 2]
            && said.contains("same command"),
        "{said}"
    );
    let blobs = cache.path().join("models--org--model/blobs");
    let kept = blobs.join(format!("{}.incomplete", sha256(&weights)));
    let came = fs::metadata(&kept).unwrap().len();
    assert!((MIB as u64..3 * MIB as u64).contains(&came));
    fake.fail(Faults::default());
    fake.asked();
    let folder = whole(&hub, "org/model").unwrap();
    let asked = fake.asked();
    let last = asked.last().unwrap();
    assert_eq!(
        last.range.as_deref(),
        Some(format!("bytes={came}-").as_str())
    );
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights);
    assert!(!kept.exists());
}

/// `model-1.safetensors`, .., each of other bytes and larger than a MiB, with what names them.
fn shards(count: usize) -> Vec<(String, Vec<u8>)> {
    let name = |i| format!("model-{i}.safetensors");
    let weights = |i| (0..2 * MIB + i).map(move |at| ((at * at + i) >> 7) as u8);
    let mut files: Vec<_> = (0..count)
        .map(|i| (name(i), weights(i).collect()))
        .collect();
    let places: Vec<String> = (0..count)
        .map(|i| format!("\"{i}\": \"{}\"", name(i)))
        .collect();
    let index = format!("{{\"weight_map\": {{{}}}}}", places.join(", "));
    files.push(("model.safetensors.index.json".into(), index.into_bytes()));
    files.push(("config.json".into(), CONFIG.to_vec()));
    files
}

fn with(files: &[(String, Vec<u8>)]) -> FakeHub {
    let files: Vec<(&str, &[u8])> = files
        .iter()
        .map(|(n, b)| (n.as_str(), b.as_slice()))
        .collect();
    FakeHub::with("org/model", &files)
}

#[test]
fn several_files_come_at_once() {
    let files = shards(6);
    let fake = with(&files);
    fake.fail(Faults {
        together: 4,
        ..Faults::default()
    });
    let cache = tempfile::tempdir().unwrap();
    let folder = whole(&fake.hub(cache.path()), "org/model").unwrap();
    assert_eq!(fake.most_at_once(), 4);
    for (name, bytes) in &files {
        assert!(fs::read(folder.join(name)).unwrap() == *bytes, "{name}");
    }
}

#[test]
fn a_file_that_fails_leaves_the_others_what_they_have() {
    let files = shards(3);
    let fake = with(&files);
    let cache = tempfile::tempdir().unwrap();
    let hub = fake.hub(cache.path());
    fake.fail(Faults {
        slow: true,
        gone: Some(sha256(&files[0].1)),
        ..Faults::default()
    });
    let (code, said) = refusal(&hub, "org/model");
    assert!(code == 2 && said.contains("model-0.safetensors"), "{said}");
    let blobs = cache.path().join("models--org--model/blobs");
    let part = |i: usize| blobs.join(format!("{}.incomplete", sha256(&files[i].1)));
    let came = [1, 2].map(|i| fs::metadata(part(i)).unwrap().len());
    assert!(
        came.iter().all(|came| (1..2 * MIB as u64).contains(came)),
        "{came:?}"
    );
    fake.fail(Faults::default());
    fake.asked();
    let folder = whole(&hub, "org/model").unwrap();
    let ranges = fake.asked().into_iter().filter_map(|asked| asked.range);
    let mut ranges: Vec<String> = ranges.collect();
    ranges.sort();
    // Of the hub, and of the content network.
    ranges.dedup();
    let mut wanted = came.map(|came| format!("bytes={came}-")).to_vec();
    wanted.sort();
    wanted.dedup();
    assert_eq!(ranges, wanted);
    for (name, bytes) in &files {
        assert!(fs::read(folder.join(name)).unwrap() == *bytes, "{name}");
    }
}

/// A mistyped path is not waited for; what was begun is.
#[test]
fn a_hub_that_is_not_there_is_asked_once() {
    let cache = tempfile::tempdir().unwrap();
    let gone = Hub {
        pause: std::time::Duration::from_secs(5),
        ..Hub::new("http://127.0.0.1:9", cache.path().to_owned())
    };
    let started = std::time::Instant::now();
    let (code, said) = refusal(&gone, "runs/kd");
    assert!(started.elapsed().as_secs() < 5);
    assert!(
        code == 1
            && said.starts_with(
                "no folder or file runs/kd is here, and the hub was asked for model runs/kd: "
            ),
        "{said}"
    );
}

#[test]
fn damaged_bytes_are_refused() {
    let weights = weights();
    let files: [(&str, &[u8]); 2] = [("config.json", CONFIG), ("model.safetensors", &weights)];
    let fake = FakeHub::with("org/model", &files);
    let cache = tempfile::tempdir().unwrap();
    let hub = fake.hub(cache.path());
    let damaged = |damaged| Faults {
        damaged,
        ..Faults::default()
    };
    fake.fail(damaged(1));
    let (code, said) = refusal(&hub, "org/model");
    assert!(
        code == 2 && said.contains("damaged") && said.contains(&sha256(&weights)),
        "{said}"
    );
    let blobs = cache.path().join("models--org--model/blobs");
    let left = |name: String| blobs.join(name).exists();
    assert!(!left(sha256(&weights)) && !left(sha256(&weights) + ".incomplete"));
    // What an earlier attempt left may be it, or longer than the file: anew.
    for wrong in [vec![7; MIB], vec![7; 4 * MIB]] {
        fs::write(blobs.join(sha256(&weights) + ".incomplete"), wrong).unwrap();
        let folder = whole(&hub, "org/model").unwrap();
        assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights);
        fs::remove_file(blobs.join(sha256(&weights))).unwrap();
    }
}

#[test]
fn the_token_is_for_the_hub_alone() {
    let files: [(&str, &[u8]); 2] = [("config.json", CONFIG), ("model.safetensors", b"weights")];
    let fake = FakeHub::with("org/model", &files);
    let cache = tempfile::tempdir().unwrap();
    whole(&fake.hub(cache.path()), "org/model").unwrap();
    let asked = fake.asked();
    assert!(asked.iter().any(|a| a.line.contains("/cdn/")));
    for asked in asked {
        let own = !asked.line.contains("/cdn/");
        assert_eq!(
            asked.token.as_deref(),
            own.then_some("Bearer secret"),
            "{asked:?}"
        );
    }
}

#[test]
fn refusals_name_the_next_step() {
    let files: [(&str, &[u8]); 2] = [("config.json", CONFIG), ("a-Q4.gguf", b"GGUF")];
    let fake = FakeHub::with("org/model", &files);
    let cache = tempfile::tempdir().unwrap();
    let hub = fake.hub(cache.path());
    let bare = Hub {
        token: None,
        ..hub.clone()
    };
    for (hub, text, code, parts) in [
        (
            &hub,
            "org/nothing",
            2,
            &[
                "no folder or file org/nothing is here",
                "no model org/nothing",
                "private",
            ][..],
        ),
        (&bare, "org/nothing", 2, &["set HF_TOKEN"]),
        (&hub, "org/model@v9", 2, &["no revision v9"]),
        (&hub, "org/model/b.gguf", 2, &["has no b.gguf"]),
        (&hub, "org/model", 2, &["name one, as org/model/a-Q4.gguf"]),
    ] {
        let (found, said) = refusal(hub, text);
        assert!(
            found == code && parts.iter().all(|part| said.contains(part)),
            "{text}: {said}"
        );
    }
    let gguf = whole(&hub, "org/model/a-Q4.gguf").unwrap();
    assert_eq!(fs::read(&gguf).unwrap(), b"GGUF");
    fake.gate();
    let cache = tempfile::tempdir().unwrap();
    let (_, said) = refusal(&fake.hub(cache.path()), "org/model");
    assert!(
        said.contains("gated") && said.contains("/org/model") && said.contains("HF_TOKEN"),
        "{said}"
    );
    // Busy for longer than one waits, and nobody there.
    fake.fail(Faults {
        busy: 9,
        ..Faults::default()
    });
    let (code, said) = refusal(&fake.hub(cache.path()), "org/model");
    assert!(
        code == 1 && said.contains("503") && said.contains("HF_ENDPOINT"),
        "{said}"
    );
    let gone = Hub {
        endpoint: "http://127.0.0.1:9".into(),
        ..hub
    };
    let (code, said) = refusal(&gone, "org/other");
    assert!(
        code == 1 && said.contains("127.0.0.1:9 cannot be reached"),
        "{said}"
    );
    // What is kept will do.
    assert_eq!(whole(&gone, "org/model/a-Q4.gguf").unwrap(), gguf);
}

/// The cache as `huggingface_hub` lays it out.
#[test]
fn what_other_tools_have_downloaded_is_found() {
    let cache = tempfile::tempdir().unwrap();
    let repo = cache.path().join("models--org--model");
    let snapshot = repo.join("snapshots").join(COMMIT);
    for folder in [&snapshot, &repo.join("blobs"), &repo.join("refs/refs/pr")] {
        fs::create_dir_all(folder).unwrap();
    }
    for (name, bytes) in [("config.json", CONFIG), ("model.safetensors", b"weights")] {
        let blob = repo.join("blobs").join(etag(name, bytes));
        fs::write(&blob, bytes).unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(
            Path::new("../../blobs").join(etag(name, bytes)),
            snapshot.join(name),
        )
        .unwrap();
        #[cfg(not(unix))]
        fs::rename(&blob, snapshot.join(name)).unwrap();
    }
    fs::write(repo.join("refs/main"), COMMIT).unwrap();
    fs::write(repo.join("refs/refs/pr/3"), COMMIT).unwrap();
    let hub = Hub {
        offline: true,
        ..Hub::new("http://127.0.0.1:9", cache.path().to_owned())
    };
    for text in [
        "org/model",
        "org/model@refs/pr/3",
        &format!("org/model@{COMMIT}"),
    ] {
        assert_eq!(whole(&hub, text).unwrap(), snapshot, "{text}");
    }
    for text in ["org/model@other", "org/other"] {
        let (code, said) = refusal(&hub, text);
        assert!(
            code == 1 && said.contains("is not in") && said.contains("HF_HUB_OFFLINE"),
            "{said}"
        );
    }
    // Nothing comes of what is there.
    let fake = FakeHub::with(
        "org/model",
        &[("config.json", CONFIG), ("model.safetensors", b"weights")],
    );
    whole(&fake.hub(cache.path()), "org/model").unwrap();
    assert_eq!(fake.downloads(), 0);
}

#[test]
fn files_of_data_sets_are_downloaded() {
    let fake = FakeHub::with(
        "datasets/org/set",
        &[("in/a.jsonl", b"{\"text\": \"a\"}\n")],
    );
    let cache = tempfile::tempdir().unwrap();
    let hub = fake.hub(cache.path());
    let named = Id::data(Path::new("hf://datasets/org/set/in/a.jsonl"))
        .unwrap()
        .unwrap();
    let path = hub.file(&named, &Quiet::default()).unwrap();
    let snapshot = cache
        .path()
        .join("datasets--org--set/snapshots")
        .join(COMMIT);
    assert_eq!(path, snapshot.join("in/a.jsonl"));
    assert_eq!(fs::read_to_string(path).unwrap(), "{\"text\": \"a\"}\n");
}

#[test]
fn data_sets_without_a_file_are_their_split_train() {
    let fake = FakeHub::start();
    let add = |set: &str, files: &[&str]| {
        let files: Vec<(&str, &[u8])> = files.iter().map(|file| (*file, &b"x"[..])).collect();
        fake.add(
            &format!("datasets/org/{set}"),
            "refs/convert/parquet",
            &files,
        );
    };
    add(
        "one",
        &["default/train/0000.parquet", "default/test/0000.parquet"],
    );
    add(
        "two",
        &["default/train/0000.parquet", "default/train/0001.parquet"],
    );
    add("mixed", &["de/train/0000.parquet", "en/train/0000.parquet"]);
    let cache = tempfile::tempdir().unwrap();
    let hub = fake.hub(cache.path());
    let quiet = Quiet::default();
    let id = |text: &str| Id::data(Path::new(text)).unwrap().unwrap();
    let files = |text: &str| -> Vec<String> {
        let found = hub.files(&id(text), &quiet).unwrap();
        found.iter().map(Id::to_string).collect()
    };
    let two = "hf://datasets/org/two@refs/convert/parquet/default/train";
    let both = ["0000", "0001"].map(|n| format!("{two}/{n}.parquet"));
    assert_eq!(files("hf://datasets/org/two"), both);
    assert_eq!(files("hf://datasets/org/mixed/de/train").len(), 1);
    let path = hub.file(&id("hf://datasets/org/one"), &quiet).unwrap();
    assert!(path.ends_with("default/train/0000.parquet") && path.exists());
    let refused = |text: &str| hub.file(&id(text), &quiet).unwrap_err().to_string();
    let said = refused("hf://datasets/org/two");
    assert!(
        said.contains("2 files") && said.contains(&both[0]),
        "{said}"
    );
    let said = refused("hf://datasets/org/mixed");
    assert!(
        said.contains("de, en: name one, as hf://datasets/org/mixed/de/train"),
        "{said}"
    );
    let said = refused("hf://datasets/org/one/default/dev");
    assert!(said.contains("split dev"), "{said}");
}

/// Two at once: one downloads, the other finds it done.
#[test]
fn processes_that_download_the_same_share_the_work() {
    let weights = weights();
    let files: [(&str, &[u8]); 2] = [("config.json", CONFIG), ("model.safetensors", &weights)];
    let fake = FakeHub::with("org/model", &files);
    let cache = tempfile::tempdir().unwrap();
    let hub = fake.hub(cache.path());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let folder = whole(&hub, "org/model").unwrap();
                assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights);
            });
        }
    });
    assert_eq!(fake.downloads(), 2);
}

/// A recipe's names are read from its folder, ids from anywhere.
#[test]
fn names_in_files_are_settled_once() {
    let folder = tempfile::tempdir().unwrap();
    let at = |said: &str| super::settled(Path::new(said), folder.path());
    assert_eq!(at("org/model@v1"), Path::new("hf://org/model@v1"));
    assert_eq!(at("hf://org/model"), Path::new("hf://org/model"));
    assert_eq!(at("../teacher"), folder.path().join("../teacher"));
    fs::create_dir_all(folder.path().join("org/model")).unwrap();
    assert_eq!(at("org/model"), folder.path().join("org/model"));
}

#[test]
fn settings_are_those_of_hugging_faces_tools() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let of = |vars: &[(&str, String)]| {
        Hub::from_vars(&|name| {
            let found = vars.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| value.clone())
        })
    };
    let plain = of(&[("HOME", text(home.path()))]);
    assert_eq!(plain.cache, at(".cache/huggingface/hub"));
    assert_eq!(plain.endpoint, "https://huggingface.co");
    assert!(plain.token.is_none() && !plain.offline);
    fs::write(at("token"), "hf_login\n").unwrap();
    let hf_home = ("HF_HOME", text(home.path()));
    let found = of(&[hf_home.clone(), ("HF_HUB_OFFLINE", "true".into())]);
    assert_eq!(found.cache, at("hub"));
    assert_eq!(found.token.as_deref(), Some("hf_login"));
    assert!(found.offline);
    let found = of(&[
        hf_home,
        ("HF_TOKEN", "hf_own".into()),
        ("HF_HUB_CACHE", text(&at("other"))),
        ("HF_ENDPOINT", "http://mirror/".into()),
        ("HF_HUB_OFFLINE", "0".into()),
    ]);
    assert_eq!(found.cache, at("other"));
    assert_eq!(found.endpoint, "http://mirror");
    assert_eq!(found.token.as_deref(), Some("hf_own"));
    assert!(!found.offline);
}
