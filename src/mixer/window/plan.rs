//! The window in a layer plan.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::WindowConfig;
use crate::mixer::AttentionConfig;

const SIZE: usize = 1024;
/// As many as StreamingLLM found to be enough.
const SINKS: usize = 4;

/// `window`, `window:SIZE` or `window:SIZE:SINKS`: 1024 and 4 where it does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WindowKind {
    pub sliding_window: Option<usize>,
    pub num_sink_tokens: Option<usize>,
}

impl WindowKind {
    pub(crate) const SPELLINGS: &str = "window, window:SIZE or window:SIZE:SINKS";

    /// From what stands after the name; `None`: not spelled so.
    pub(crate) fn parse(arguments: &[&str]) -> Option<Self> {
        let number = |i: usize| {
            let number = arguments.get(i).map(|text| text.parse());
            number.transpose().ok()
        };
        (arguments.len() <= 2).then_some(())?;
        Some(Self {
            sliding_window: number(0)?,
            num_sink_tokens: number(1)?,
        })
    }

    /// The config in the place of attention `a`.
    pub(crate) fn settle(&self, a: &AttentionConfig) -> WindowConfig {
        WindowConfig {
            attention: a.clone(),
            sliding_window: self.sliding_window.unwrap_or(SIZE),
            num_sink_tokens: self.num_sink_tokens.unwrap_or(SINKS),
        }
    }
}

impl fmt::Display for WindowKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("window")?;
        let mut sizes = [self.sliding_window, self.num_sink_tokens]
            .into_iter()
            .flatten();
        sizes.try_for_each(|size| write!(f, ":{size}"))
    }
}
