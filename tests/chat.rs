//! Conversations through standard input, and prompts from wherever they come.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};

use crate::program::command;

const TEACHER: &str = "assets/teacher";
/// What was said, one after the other: the embedded teacher knows stories only.
const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' and not loop.first %} {% endif %}{{ m.content }}{% endfor %}";

fn with_input(args: &[&str], input: &str, out: Stdio) -> Output {
    let mut child = (command().args(args).stdin(Stdio::piped()))
        .stdout(out)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    child.wait_with_output().unwrap()
}

fn said(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn template(folder: &Path) -> String {
    let path = folder.join("template.jinja");
    std::fs::write(&path, TEMPLATE).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_conversation_goes_on_in_another_process() {
    let folder = tempfile::tempdir().unwrap();
    let template = template(folder.path());
    let chat = |session: &str, input: &str| {
        let session = folder.path().join(session);
        let args = [
            "chat",
            TEACHER,
            "--chat-template",
            &template,
            "--max-tokens",
            "8",
        ];
        let session = ["--session", session.to_str().unwrap()];
        with_input(&[&args[..], &session].concat(), input, Stdio::piped())
    };
    let (first, second) = ("Tom had a red ball.", "Mia had a blue kite.");
    let whole = said(&chat("one", &format!("{first}\n{second}\n")));
    assert_eq!(whole.lines().count(), 2, "{whole}");
    let beginning = said(&chat("two", &format!("{first}\n")));
    let rest = chat(
        "two",
        &format!("{second}\n/stats\n/regenerate\n/nonsense\n"),
    );
    let stats = String::from_utf8(rest.stderr.clone()).unwrap();
    let rest = said(&rest);
    assert_eq!(whole, beginning + rest.lines().next().unwrap() + "\n");
    assert_eq!(
        rest.lines().next(),
        rest.lines().nth(1),
        "greedy answers are the same"
    );
    assert!(
        stats.contains("2 messages") && !stats.contains("(0 read before)"),
        "{stats}"
    );
    assert!(stats.contains("/regenerate"), "{stats}");
    // The session is whole after every answer; of another model it is refused.
    let bytes = std::fs::read(folder.path().join("two")).unwrap();
    std::fs::write(folder.path().join("cut"), &bytes[..bytes.len() / 2]).unwrap();
    let output = chat("cut", "Hello\n");
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

#[test]
fn what_a_chat_cannot_do_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let output = with_input(&["chat", TEACHER], "Hello\n", Stdio::piped());
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.code() == Some(2) && error.contains("--chat-template"),
        "{error}"
    );
    let broken = folder.path().join("broken.jinja");
    std::fs::write(&broken, "{% for %}").unwrap();
    let broken = broken.to_str().unwrap();
    let output = with_input(
        &["chat", TEACHER, "--chat-template", broken],
        "",
        Stdio::piped(),
    );
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.code() == Some(2) && error.contains("broken.jinja"),
        "{error}"
    );
    if cfg!(target_os = "linux") {
        let template = template(folder.path());
        let full = File::options().write(true).open("/dev/full").unwrap();
        let args = [
            "chat",
            TEACHER,
            "--chat-template",
            &template,
            "--max-tokens",
            "2",
        ];
        let output = with_input(&args, "Tom\n", full.into());
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(
            output.status.code() == Some(1) && error.contains("No space left"),
            "{error}"
        );
    }
}

/// As `transformers` has it. No two places are further apart than these: it is never the same day in both.
#[cfg(unix)]
#[test]
fn templates_are_told_the_local_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("template.jinja");
    std::fs::write(
        &path,
        "{{ raise_exception(strftime_now('it is the %d.')) }}",
    )
    .unwrap();
    let day = |zone: &str| {
        let mut chat = command();
        chat.args(["chat", TEACHER, "--chat-template", path.to_str().unwrap()]);
        let mut child = (chat.env("TZ", zone).stdin(Stdio::piped()))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(b"Hello\n").unwrap();
        let said = String::from_utf8(child.wait_with_output().unwrap().stderr).unwrap();
        let (_, day) = said.split_once("it is the ").expect(&said);
        day[..2].parse::<u8>().unwrap()
    };
    assert_ne!(day("<+14>-14"), day("<-12>12"));
}

#[test]
fn prompts_come_from_arguments_files_and_standard_input() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    std::fs::write(&file, "Tom had a red").unwrap();
    let file = file.to_str().unwrap();
    let generate = |args: &[&str], input: &str| {
        let all = [&["generate", TEACHER, "--max-tokens", "5"], args].concat();
        said(&with_input(&all, input, Stdio::piped()))
    };
    let plain = generate(&["--prompt", "Tom had a red"], "");
    assert_eq!(generate(&["--prompt-file", file], ""), plain);
    assert_eq!(generate(&["--prompt-file", "-"], "Tom had a red"), plain);
    let two = generate(
        &["--prompts", "-", "--json"],
        "Tom had a red\n\nMia had a blue\n",
    );
    let two: serde_json::Value = serde_json::from_str(&two).unwrap();
    assert_eq!(
        plain.trim_end(),
        format!("Tom had a red{}", two[0]["text"].as_str().unwrap())
    );
    assert_eq!(two.as_array().unwrap().len(), 2);
    let three = generate(
        &["--prompt", "Tom", "-n", "3", "--temperature", "1", "--json"],
        "",
    );
    let three: serde_json::Value = serde_json::from_str(&three).unwrap();
    assert_eq!(three.as_array().unwrap().len(), 3);
    let output = with_input(
        &["generate", TEACHER, "--prompts", "-"],
        "\n",
        Stdio::piped(),
    );
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}
