#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let _ = zebroid::fuzz::request(input);
});
