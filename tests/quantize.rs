//! `quantize --type f8_e4m3`: a folder that we and others read. Of GGUF files see `golden/gguf.rs`.

use serde_json::Value;

use crate::program::{TEACHER, fails, succeeds, text};

#[test]
fn eight_bits_with_an_exponent_cost_little() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    let (out, texts) = (at("f8"), at("texts.jsonl"));
    let line = r#"{"text": "Tom had a red ball. He liked to play with it in the park with his friend Anna, and they were happy."}"#;
    std::fs::write(&texts, format!("{line}\n").repeat(4)).unwrap();
    let f8 = ["quantize", TEACHER, text(&out), "--type", "f8_e4m3"];
    let measured = ["--validation", text(&texts), "--seq-len", "16", "--json"];
    let said = succeeds(&[&f8[..], &measured].concat());
    let report: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(report["type"], "f8_e4m3");
    assert_eq!(report["other_types"][0], "model.embed_tokens.weight");
    let kl = report["measured"]["kl"].as_f64().unwrap();
    assert!(kl > 0. && kl < 0.01, "{kl}");
    let config = std::fs::read_to_string(out.join("config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(
        config["quantization_config"]["quant_method"],
        "compressed-tensors"
    );
    assert!(succeeds(&["info", text(&out)]).contains("f8_e4m3"));
    let told = |model: &str| {
        succeeds(&[
            "generate",
            model,
            "--prompt",
            "Tom had a",
            "--max-tokens",
            "8",
        ])
    };
    // Rounded to f32, which holds all of it, they are the same weights.
    let wide = at("wide");
    succeeds(&[
        "export",
        text(&out),
        text(&wide),
        "--format",
        "llama",
        "--dtype",
        "f32",
    ]);
    assert_eq!(told(text(&out)), told(text(&wide)));
    let gguf = at("wide.gguf");
    succeeds(&["export", text(&out), text(&gguf), "--format", "gguf"]);
    assert_eq!(told(text(&out)), told(text(&gguf)));
    for (args, why) in [
        (&["--type", "f8_e4m3", "x.gguf"][..], "GGUF has no f8_e4m3"),
        (
            &["--type", "f8_e5m2", "x"],
            "choose q8_0, q6_k, q4_k, q4_0, or f8_e4m3",
        ),
        (
            &["--type", "f8_e4m3", "x", "--calibration", text(&texts)],
            "leave out --calibration",
        ),
    ] {
        let said = fails(2, &[&["quantize", TEACHER], args].concat());
        assert!(said.contains(why), "{said}");
    }
}
