//! Families of pretrained models: what their `config.json` says, one file each.

pub(super) mod llama;
