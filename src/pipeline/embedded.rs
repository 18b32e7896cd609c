//! The teacher that the program carries: trained by `recipes/teacher.sh` on the program's own stories.

use std::path::Path;

use crate::Result;
use crate::{Error, checkpoint};

const FILES: &[(&str, &[u8])] = &[
    (
        "config.json",
        include_bytes!("../../assets/teacher/config.json"),
    ),
    (
        "model.safetensors",
        include_bytes!("../../assets/teacher/model.safetensors"),
    ),
    (
        "tokenizer.json",
        include_bytes!("../../assets/teacher/tokenizer.json"),
    ),
    (
        "tokenizer_config.json",
        include_bytes!("../../assets/teacher/tokenizer_config.json"),
    ),
];

/// Writes the teacher as a Hugging Face folder.
pub fn write_teacher(folder: &Path) -> Result<()> {
    let partial = folder.with_extension("partial");
    std::fs::create_dir_all(&partial).map_err(Error::io("cannot create", &partial))?;
    for (name, bytes) in FILES {
        checkpoint::write_atomic(&partial.join(name), bytes)?;
    }
    checkpoint::replace_folder(&partial, folder, false)
}

/// The recipe of `zebroid demo`.
pub const DEMO: &str = include_str!("../../recipes/demo.toml");
