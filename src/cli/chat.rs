//! `zebroid chat`: a conversation in the terminal.

use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;

use super::arg::chat::ChatArg;
use super::arg::engine::EngineArg;
use super::arg::hub::Model;
use super::arg::sampling::SamplingArg;
use super::show::{check_file, interrupt, note, print};
use crate::Error;
use crate::data::chat::{ChatTemplate, Message};
use crate::generate::{Engine, Event, Generation, Request, SamplingParams, Scheduler, Session};
use crate::mixer::Memory;

/// Talk with a model. Ctrl-C stops an answer and keeps the conversation; Ctrl-D ends it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid chat ./hybrid --system \"Be brief.\" --temperature 0.7\n  \
    zebroid chat model.gguf --session talk.session   (goes on where it ended)\n\n\
    Lines that begin with a slash are commands:\n  \
    /regenerate  another answer to what was said last\n  \
    /clear       begin anew\n  \
    /stats       tokens, time to the first token, tokens a second, what was read before\n  \
    /exit        end")]
pub struct Args {
    /// Checkpoint folder of any format, with its tokenizer, a .gguf file, or a Hugging Face id.
    checkpoint: Model,
    /// What the model is told first.
    #[arg(long)]
    system: Option<String>,
    /// A file that the conversation is kept in after every answer, and goes on from where it exists.
    #[arg(long)]
    session: Option<PathBuf>,
    #[command(flatten)]
    template: ChatArg,
    #[command(flatten)]
    sampling: SamplingArg,
    #[command(flatten)]
    engine: EngineArg,
}

struct Talk<'e> {
    engine: &'e Engine,
    template: ChatTemplate,
    params: SamplingParams,
    session: Session,
    /// What had been read before the last answer: text, tokens, memory.
    before: (String, Vec<u32>, Memory),
    last: Option<Generation>,
    /// Answers so far: each draws from a stream of its own.
    answers: u64,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let params = args.sampling.params()?;
    args.session.iter().try_for_each(|path| check_file(path))?;
    let checkpoint = args.checkpoint.fetch()?;
    let template = args.template.open(&checkpoint)?;
    let engine = args.engine.open(&checkpoint)?;
    let system = args.system.iter().map(|text| Message {
        role: "system".into(),
        content: text.clone(),
    });
    let system: Vec<Message> = system.collect();
    let kept = args.session.as_deref().filter(|path| path.exists());
    let session = match kept {
        Some(path) => Session::open(&engine, path)?,
        None => Session::new(&engine, system.clone()),
    };
    let mut talk = Talk {
        engine: &engine,
        template,
        params,
        before: (String::new(), Vec::new(), engine.pool.sequence()),
        session,
        last: None,
        answers: 0,
    };
    interrupt::install();
    let terminal = std::io::stdin().is_terminal();
    if let Some(path) = kept {
        let (messages, read) = (talk.session.messages.len(), talk.session.memory.len());
        note(format_args!(
            "{}: {messages} messages, {read} tokens read before",
            path.display()
        ));
    }
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if terminal {
            print("> ")?;
        }
        let Some(line) = lines.next() else {
            break;
        };
        let line = line.map_err(|e| Error::invalid(format!("cannot read standard input: {e}")))?;
        interrupt::taken();
        match line.trim() {
            "" => continue,
            "/exit" | "/quit" => break,
            "/clear" => talk.session = Session::new(&engine, system.clone()),
            "/stats" => talk.tell(),
            "/regenerate" => {
                let answered = |m: &Message| m.role == "assistant";
                if talk.session.messages.pop_if(|m| answered(m)).is_none() {
                    note("nothing was answered yet");
                    continue;
                }
                let (text, tokens, memory) = talk.before.clone();
                (talk.session.text, talk.session.tokens, talk.session.memory) =
                    (text, tokens, memory);
                talk.answer()?;
            }
            command if command.starts_with('/') => {
                note("commands: /regenerate /clear /stats /exit");
            }
            said => {
                talk.session.messages.push(Message {
                    role: "user".into(),
                    content: said.to_owned(),
                });
                talk.answer()?;
            }
        }
        if let Some(path) = &args.session {
            talk.session.save(&engine, path)?;
        }
    }
    if terminal {
        print("\n")?;
    }
    Ok(())
}

impl Talk<'_> {
    /// The next message, printed as it comes.
    fn answer(&mut self) -> anyhow::Result<()> {
        let text = self.template.render(&self.session.messages)?;
        let session = &self.session;
        let prompt = session.prompt(self.engine, &text)?;
        // What was read serves if the prompt begins with it, as it does unless the template rewrites what was said.
        let read = session.memory.len();
        let serves = read < prompt.len() && prompt.starts_with(&session.tokens[..read]);
        self.before = (
            session.text.clone(),
            session.tokens.clone(),
            session.memory.clone(),
        );
        let params = SamplingParams {
            seed: self.params.seed.wrapping_add(self.answers),
            ..self.params.clone()
        };
        self.answers += 1;
        let mut scheduler = Scheduler::new(self.engine);
        scheduler.submit(Request {
            memory: serves.then(|| session.memory.clone()),
            ..Request::new(0, prompt, params)
        })?;
        let mut stopping = false;
        while !scheduler.is_idle() {
            if !stopping && interrupt::taken() {
                stopping = true;
                scheduler.stop(0);
            }
            for event in scheduler.step()? {
                match event {
                    Event::Text { text, .. } => print(text)?,
                    Event::Failed { error, .. } => return Err(error.into()),
                    Event::Done { finish, .. } => {
                        let messages = std::mem::take(&mut self.session.messages);
                        let text = text.clone();
                        self.session = Session::after(self.engine, messages, text, &finish);
                        self.session.messages.push(Message {
                            role: "assistant".into(),
                            content: finish.generation.text.clone(),
                        });
                        self.last = Some(finish.generation);
                    }
                }
            }
        }
        print("\n")?;
        Ok(())
    }

    fn tell(&self) {
        let Some(last) = &self.last else {
            note("nothing was answered yet");
            return;
        };
        note(format_args!(
            "prompt {} tokens ({} read before), answer {} tokens ({}), first token after {:.2} s, {:.1} tokens/s, cache {} bytes",
            last.prompt_tokens,
            last.cached_tokens,
            last.completion_tokens,
            last.finish_reason,
            last.ttft_s,
            last.decode_tokens_per_s,
            self.session.memory.bytes()
        ));
    }
}
