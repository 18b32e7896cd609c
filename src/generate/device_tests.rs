//! The engine over the kernels for a GPU: on the one that is tested, else by the emulator.

use super::tests::{PROMPTS, ended, engine, greedy, models};
use super::*;
use crate::op::cuda::Cuda;
use crate::op::cuda::emulated::{Emulated, SMALLER};
use crate::op::laws::device;

/// Folders of kernels that decoding launches.
const OPS: [&str; 8] = [
    "linear",
    "mamba2_step",
    "paged_attention",
    "rms_norm",
    "rope",
    "sample",
    "swiglu",
    "window_step",
];

/// The same engine on a device; none where there is neither a GPU to be tested nor the emulator.
fn on_device(engine: Engine, memory: usize, records: bool) -> Option<Engine> {
    let decoder = match device().is_cpu() {
        true => {
            let mut gpu = Emulated::of_all(&OPS, 0)?;
            // Latents in f32 get fewer warps there.
            if engine.options.cache_type == CacheType::F32 {
                gpu.shared_memory = SMALLER;
            }
            (engine.decoder).launching_on(gpu, records)
        }
        false => (engine.decoder).launching_on(Cuda::on(device()).unwrap(), records),
    };
    let decoder = decoder.unwrap();
    let pool = decoder.pool(engine.options.cache_type, memory).unwrap();
    Some(Engine {
        decoder,
        pool,
        ..engine
    })
}

fn run(engine: &Engine, tokens: usize) -> (Vec<String>, Statistics) {
    let mut scheduler = Scheduler::new(engine);
    for (i, prompt) in PROMPTS.iter().enumerate() {
        let prompt = engine.prompt(prompt).unwrap();
        let request = Request::new(i as u64, prompt, greedy(tokens));
        scheduler.submit(request).unwrap();
    }
    let found = ended(&mut scheduler)
        .into_values()
        .map(|g| g.text)
        .collect();
    let statistics = scheduler.statistics();
    drop(scheduler);
    assert_eq!(engine.pool.used(), 0);
    (found, statistics)
}

/// The law of the engine on a device: the CPU's texts, whatever is kept how, cut where, let go of and read again.
#[test]
fn the_kernels_continue_as_the_cpu_does() {
    let [_, hybrid] = models();
    // Room for two of the three.
    for (cache_type, chunk, prefix, records) in [
        (CacheType::F32, 512, false, false),
        (CacheType::F16, 5, true, false),
        (CacheType::Int8, 512, false, true),
    ] {
        let change = |options: &mut EngineOptions| {
            options.cache_type = cache_type;
            options.prefill_chunk = chunk;
            options.prefix_cache = prefix;
        };
        let cpu = engine(&hybrid, change);
        let one = cpu.pool.bytes(cpu.prompt(PROMPTS[1]).unwrap().len() + 9);
        let Some(device) = on_device(engine(&hybrid, change), 2 * one + one / 3, records) else {
            return;
        };
        let (expected, _) = run(&cpu, 8);
        let (found, statistics) = run(&device, 8);
        assert_eq!(found, expected, "{cache_type}");
        assert!(statistics.preempted > 0, "{statistics:?}");
    }
}

/// What one has read the other goes on from; several answers share it until they write.
#[test]
fn memories_move_between_the_cpu_and_a_device() {
    let [_, hybrid] = models();
    let cpu = engine(&hybrid, |_| ());
    let Some(device) = on_device(engine(&hybrid, |_| ()), 1 << 19, false) else {
        return;
    };
    let prompt = cpu.prompt(PROMPTS[2]).unwrap();
    let (read, rest) = (prompt.len(), 6);
    let begun = |engine: &Engine| {
        let mut scheduler = Scheduler::new(engine);
        let request = Request::new(0, prompt.clone(), greedy(rest));
        scheduler.submit(request).unwrap();
        loop {
            let done = scheduler.step().unwrap().into_iter().find_map(|e| match e {
                Event::Done { finish, .. } => Some(finish),
                _ => None,
            });
            if let Some(finish) = done {
                return (finish.tokens, finish.memory.to_bytes().unwrap());
            }
        }
    };
    let continued = |engine: &Engine, (tokens, bytes): &(Vec<u32>, Vec<u8>)| {
        let mut scheduler = Scheduler::new(engine);
        let request = Request::new(0, tokens.clone(), greedy(rest));
        let stored = Some((read + rest - 1, bytes.clone()));
        let siblings = vec![(1, 1), (2, 2)];
        scheduler
            .submit(Request {
                stored,
                siblings,
                ..request
            })
            .unwrap();
        let found = ended(&mut scheduler).into_values();
        let found = found.map(|g| (g.cached_tokens, g.text));
        found.collect::<Vec<_>>()
    };
    let (ours, theirs) = (begun(&cpu), begun(&device));
    assert_eq!(ours.0, theirs.0);
    let expected = continued(&cpu, &ours);
    assert_eq!(expected[0].0, read + rest - 1);
    for (engine, begun) in [(&cpu, &theirs), (&device, &ours), (&device, &theirs)] {
        assert_eq!(continued(engine, begun), expected);
        assert_eq!(engine.pool.used(), 0);
    }
}

/// By temperature alone a device draws what the CPU does: in the order of the vocabulary, by the same random numbers. Limits leave the
/// same tokens, and a seed gives the same text again.
#[test]
fn a_device_draws_by_the_same_random_numbers() {
    let [teacher, _] = models();
    let cpu = engine(&teacher, |_| ());
    let Some(device) = on_device(engine(&teacher, |_| ()), 1 << 19, false) else {
        return;
    };
    let texts = |engine: &Engine, params: &SamplingParams| {
        let found = engine.generate(&PROMPTS[..2], 1, params, &mut |_, _| true);
        let found = found.unwrap().into_iter().flatten().map(|g| g.text);
        found.collect::<Vec<_>>()
    };
    let params = SamplingParams {
        temperature: 0.8,
        seed: 3,
        ..greedy(5)
    };
    assert_eq!(texts(&device, &params), texts(&cpu, &params));
    let limited = SamplingParams {
        top_k: 20,
        top_p: 0.9,
        ..params.clone()
    };
    let [found, again] = [0, 1].map(|_| texts(&device, &limited));
    assert_eq!(found, again);
    let one = SamplingParams {
        top_k: 1,
        ..params.clone()
    };
    assert_eq!(texts(&device, &one), texts(&cpu, &one));
}
