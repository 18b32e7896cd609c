//! What a record of a preference file means: a prompt, the answer that was chosen, and the one that was rejected (TRL's formats: `prompt`,
//! `chosen`, `rejected` are strings, or lists of messages; without a `prompt` it is what both conversations begin with).

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Tokenizer;
use super::text::{Document, Reader, conversation};
use crate::{Error, Result};

/// One record of a preference file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preference {
    pub prompt: String,
    pub chosen: String,
    pub rejected: String,
}

/// How much of a pair is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Lengths {
    /// Tokens of a prompt, its last ones.
    pub max_prompt: usize,
    /// Of a prompt with its answer.
    pub max_length: usize,
}

/// What records should be.
pub(super) const WANTED: &str =
    "a JSON object with \"prompt\", \"chosen\" and \"rejected\", strings or lists of messages";

/// A record's prompt with the chosen and with the rejected answer.
///
/// # Errors
/// Other fields, an empty answer, twice the same answer.
pub(super) fn pair(record: &Value, reader: &Reader, lengths: Lengths) -> Result<[Document; 2]> {
    let (line, templated) = match record["chosen"].is_array() {
        true => (templated(record, reader)?, true),
        false => {
            let line = serde_json::from_value(record.clone());
            let line = line.map_err(|e| Error::invalid(format!("not {WANTED}: {e}")))?;
            (line, false)
        }
    };
    if line.chosen.is_empty() || line.rejected.is_empty() {
        return Err(Error::invalid("an empty answer"));
    }
    if line.chosen == line.rejected {
        return Err(Error::invalid("the chosen answer is the rejected one"));
    }
    let answer = |text| answer(reader.tokenizer, &line.prompt, text, templated, lengths);
    Ok([answer(&line.chosen)?, answer(&line.rejected)?])
}

/// Conversations as the template writes them: what both begin with, and how each ends.
fn templated(record: &Value, reader: &Reader) -> Result<Preference> {
    let list = |name: &str| record[name].as_array().cloned().unwrap_or_default();
    let [prompt, mut chosen, mut rejected] = ["prompt", "chosen", "rejected"].map(list);
    for (name, messages) in [("chosen", &chosen), ("rejected", &rejected)] {
        if messages.is_empty() {
            return Err(Error::invalid(format!("{name} is no list of messages")));
        }
    }
    let mut asked = prompt;
    if asked.is_empty() {
        let same = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b);
        let same = same.count().min(chosen.len().saturating_sub(1));
        asked = chosen[..same].to_vec();
        (chosen, rejected) = (
            chosen.split_off(same),
            rejected.split_off(same.min(rejected.len())),
        );
    }
    let template = reader.template()?;
    let tools = &record["tools"];
    let prompt = template.render_json(&Value::from(asked.clone()), tools, true)?;
    let answer = |messages: Vec<Value>| {
        let all = [asked.clone(), messages].concat();
        let text = conversation(template, &all, tools, asked.len())?.text;
        let answer = text.strip_prefix(&prompt).map(str::to_owned);
        answer.ok_or_else(|| {
            Error::invalid("the chat template writes the prompt otherwise when it is answered")
        })
    };
    let (chosen, rejected) = (answer(chosen)?, answer(rejected)?);
    Ok(Preference {
        chosen,
        rejected,
        prompt,
    })
}

/// A prompt and its answer, which is learned.
fn answer(
    tokenizer: &Tokenizer,
    prompt: &str,
    answer: &str,
    templated: bool,
    lengths: Lengths,
) -> Result<Document> {
    let text = format!("{prompt}{answer}");
    let tokens = tokenizer.encode_with_offsets(&text, !templated)?;
    // A token across the border holds the answer's beginning.
    let from = tokens
        .iter()
        .take_while(|(_, at)| at.end <= prompt.len())
        .count();
    let mut ids: Vec<u32> = tokens.into_iter().map(|(id, _)| id).collect();
    ids.extend(tokenizer.eos().first().filter(|_| !templated));
    // One token stays before the answer, so that its first can be predicted.
    let cut = (ids.len().saturating_sub(lengths.max_length))
        .max(from.saturating_sub(lengths.max_prompt))
        .min(from.saturating_sub(1));
    let from = (from - cut).max(1);
    let kept = ids.into_iter().skip(cut).take(lengths.max_length.max(2));
    Ok(kept.enumerate().map(|(at, id)| (id, at >= from)).collect())
}
