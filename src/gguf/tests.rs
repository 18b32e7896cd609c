use super::*;

type Tensors = Vec<(String, Vec<usize>, Storage)>;

fn sample() -> (Vec<(&'static str, Value)>, Tensors) {
    let texts = ["a", "βγ", ""].map(|t| Value::Text(t.into()));
    let metadata = vec![
        ("general.architecture", Value::Text("llama".into())),
        ("llama.block_count", Value::Unsigned(2)),
        ("large", Value::Unsigned(1 << 40)),
        ("negative", Value::Signed(-3)),
        ("eps", Value::Float(f64::from(1e-5f32))),
        ("flag", Value::Bool(true)),
        ("tokens", Value::Array(texts.to_vec())),
        ("nothing", Value::Array(Vec::new())),
    ];
    let tensors = vec![
        ("norm".into(), vec![5], Storage::F32),
        ("up".into(), vec![3, 256], Storage::Blocks(BlockType::Q4K)),
        ("down".into(), vec![2, 64], Storage::Blocks(BlockType::Q8_0)),
        ("head".into(), vec![4, 6], Storage::Bf16),
    ];
    (metadata, tensors)
}

fn file() -> Vec<u8> {
    let (metadata, tensors) = sample();
    let (mut file, offsets) = header(&metadata, &tensors).unwrap();
    let last = offsets.last().unwrap() + 4 * 6 * 2;
    file.resize(file.len() + last, 7);
    file
}

#[test]
fn a_header_comes_back_as_it_was_written() {
    let (metadata, tensors) = sample();
    let file = file();
    let read = Header::read(&file).unwrap();
    assert_eq!(read.metadata.len(), metadata.len());
    for (key, value) in &metadata {
        assert_eq!(&read.metadata[*key], value, "{key}");
    }
    for (name, shape, storage) in &tensors {
        let info = &read.tensors[name];
        assert_eq!((&info.shape, &info.storage), (shape, storage), "{name}");
        assert!(info.range.start.is_multiple_of(ALIGNMENT) && info.range.end <= file.len());
    }
    assert_eq!(read.tensors["head"].range.end, file.len());
}

/// Cut anywhere, or with any byte changed, a file is read or refused with a word: no panic, nothing huge.
#[test]
fn damaged_headers_are_refused() {
    let whole = file();
    let last = Header::read(&whole).unwrap().tensors["norm"].range.start;
    for end in 0..whole.len() {
        let message = Header::read(&whole[..end]).unwrap_err().to_string();
        assert!(!message.is_empty());
    }
    for at in 0..last {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut damaged = whole.clone();
            damaged[at] = value;
            let _ = Header::read(&damaged);
        }
    }
}

#[test]
fn errors_say_what_is_wrong() {
    let say = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut file = file();
        change(&mut file);
        Header::read(&file).unwrap_err().to_string()
    };
    let at = |text: &str| {
        let file = file();
        let found = file.windows(text.len()).position(|w| w == text.as_bytes());
        found.unwrap() + text.len()
    };
    assert!(say(&|f| f[0] = b'X').contains("not a GGUF file"));
    assert!(say(&|f| f[4] = 2).contains("version 2"));
    assert!(say(&|f| f[15] = 9).contains("tensors do not fit"));
    // The type of a tensor stands after its name, its axes and their number.
    assert!(say(&|f| f[at("norm") + 4 + 8] = 99).contains("tensor norm: ggml type 99"));
    assert!(say(&|f| f[at("norm") + 4 + 8 + 4] = 1).contains("no multiple of 32"));
    assert!(say(&|f| f[at("up") + 4] = 1).contains("blocks have 256"));
    assert!(say(&|f| f.truncate(f.len() - 1)).contains("tensor head: bytes"));
    assert!(say(&|f| f[at("large") + 4 + 8] = 0xff).len() > 10);
}

#[test]
fn special_tokens_are_named_as_templates_name_them() {
    let text = |text: &str| Value::Text(text.into());
    let metadata = BTreeMap::from([
        (
            "tokenizer.ggml.tokens".to_owned(),
            Value::Array(vec![text("<unk>"), text("<s>"), text("</s>")]),
        ),
        ("tokenizer.ggml.bos_token_id".to_owned(), Value::Unsigned(1)),
        ("tokenizer.ggml.eos_token_id".to_owned(), Value::Unsigned(2)),
        (
            "tokenizer.ggml.padding_token_id".to_owned(),
            Value::Unsigned(9),
        ),
    ]);
    let found = tokenizer::special(&metadata);
    let pair = |name: &str, text: &str| (name.to_owned(), text.to_owned());
    assert_eq!(found, [pair("bos_token", "<s>"), pair("eos_token", "</s>")]);
}
