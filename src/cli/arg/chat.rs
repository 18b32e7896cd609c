//! `--chat-template`: how a conversation is written for a model.

use std::path::Path;

use crate::data::chat::{CHATML, ChatTemplate};
use crate::{Error, Result};

#[derive(Debug, Clone, clap::Args)]
pub struct ChatArg {
    /// A Jinja file in the place of the checkpoint's own template; chatml: OpenAI's.
    #[arg(long)]
    chat_template: Option<String>,
}

impl ChatArg {
    /// The template that was asked for, with the checkpoint's special tokens.
    ///
    /// # Errors
    /// A file that cannot be read, or is no template.
    pub fn asked(&self, checkpoint: &Path) -> Result<Option<ChatTemplate>> {
        match self.chat_template.as_deref() {
            None => Ok(None),
            Some("chatml") => ChatTemplate::new(CHATML, Vec::new()).map(Some),
            Some(path) => {
                let path = Path::new(path);
                let text = std::fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
                let template = ChatTemplate::new(&text, ChatTemplate::tokens(checkpoint)?);
                template
                    .map(Some)
                    .map_err(|e| Error::file(path, e.to_string()))
            }
        }
    }

    /// That, or the checkpoint's own.
    ///
    /// # Errors
    /// None of both, besides.
    pub fn open(&self, checkpoint: &Path) -> Result<ChatTemplate> {
        let found = match self.asked(checkpoint)? {
            Some(template) => Some(template),
            None => ChatTemplate::open(checkpoint)?,
        };
        found.ok_or_else(|| {
            Error::file(
                checkpoint,
                "has no chat template: name one with --chat-template FILE (or chatml), or use zebroid generate",
            )
        })
    }
}
