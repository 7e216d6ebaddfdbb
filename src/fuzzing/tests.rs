//! Runs the targets with mutations of their seeds.

use std::env;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fastrand::Rng;

use super::TARGETS;

/// Longest input. The seeds are shorter.
const LONGEST: usize = 16 * 1024;

/// Most inputs in the corpus.
const MOST: usize = 512;

fn package() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

/// The time for each target: `AFTERIMAGE_TEST_FUZZ_SECONDS`, or else `AFTERIMAGE_TEST_FUZZ_MILLISECONDS`, which is 300. Only the first,
/// the soak's, tries others each time: a change must not fail in CI by what it hasn't touched.
fn time() -> (Duration, Rng) {
    let number = |name: &str| Some(env::var(name).ok()?.parse().expect("a number"));
    if let Some(seconds) = number("AFTERIMAGE_TEST_FUZZ_SECONDS") {
        return (Duration::from_secs(seconds), Rng::new());
    }
    let milliseconds = number("AFTERIMAGE_TEST_FUZZ_MILLISECONDS").unwrap_or(300);
    (Duration::from_millis(milliseconds), Rng::with_seed(1))
}

/// Runs a target with its seeds, and then with mutations of them until the time is over.
pub(super) fn run(name: &str, target: fn(&[u8])) {
    let seeds = seeds(name);
    let execute = |input: &[u8]| {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(input))) {
            let file = env::temp_dir().join(format!("afterimage-fuzz-{name}"));
            let written = fs::write(&file, input);
            eprintln!("fuzz: {name}: {} ({written:?}): {}", file.display(), input.escape_ascii());
            resume_unwind(panic);
        }
    };
    execute(b"");
    for seed in &seeds {
        execute(seed);
    }
    let (tokens, (time, mut rng)) = (tokens(), time());
    let (began, mut executions) = (Instant::now(), 1 + seeds.len());
    // Inputs lead to others that none of the seeds is near to.
    let mut corpus = seeds.clone();
    while began.elapsed() < time {
        let mut input = rng.choice(&corpus).expect("a seed").clone();
        for _ in 0..rng.usize(1..=4) {
            mutate(&mut input, &corpus, &tokens, &mut rng);
        }
        input.truncate(LONGEST);
        execute(&input);
        executions += 1;
        if executions.is_multiple_of(16) {
            if corpus.len() < MOST {
                corpus.push(input);
            } else {
                let at = rng.usize(seeds.len()..MOST.max(seeds.len() + 1));
                corpus[at] = input;
            }
        }
    }
    println!("fuzz: {name}: {executions} executions in {:.1} s", began.elapsed().as_secs_f32());
}

/// Changes an input in one place.
fn mutate(input: &mut Vec<u8>, corpus: &[Vec<u8>], tokens: &[Vec<u8>], rng: &mut Rng) {
    let at = rng.usize(..=input.len());
    let behind = rng.usize(at..=input.len().min(at + 64));
    match rng.u8(..8) {
        0 if at < input.len() => input[at] ^= 1 << rng.u8(..8),
        1 if at < input.len() => input[at] = rng.u8(..),
        2 if at < input.len() => {
            // Numbers at their ends.
            let number = *rng.choice(&[0, 1, 0x7f, 0x80, 0xff]).expect("numbers");
            let end = input.len().min(at + (1 << rng.usize(..3)));
            input[at..end].fill(number);
        }
        3 => drop(input.drain(at..behind)),
        4 => {
            let part = input[at..behind].to_vec();
            let to = rng.usize(..=input.len());
            input.splice(to..to, part);
        }
        5 => {
            let other = rng.choice(corpus).expect("a seed");
            let start = rng.usize(..=other.len());
            let end = rng.usize(start..=other.len());
            input.splice(at..behind, other[start..end].iter().copied());
        }
        6 => {
            let other = rng.choice(corpus).expect("a seed");
            input.truncate(at);
            input.extend_from_slice(&other[rng.usize(..=other.len())..]);
        }
        _ => {
            let token = rng.choice(tokens).expect("a token");
            let end = if rng.bool() { at } else { behind };
            input.splice(at..end, token.iter().copied());
        }
    }
}

fn seeds(name: &str) -> Vec<Vec<u8>> {
    let folder = package().join("seeds").join(name);
    let entries =
        fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} must have a seed", folder.display());
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// The tokens of the dictionary, which libFuzzer reads as well: one a line, in quotes.
fn tokens() -> Vec<Vec<u8>> {
    let text = fs::read_to_string(package().join("dictionary")).unwrap();
    let tokens = text.lines().filter_map(|line| line.strip_prefix('"')?.strip_suffix('"'));
    tokens.map(unescaped).collect()
}

fn unescaped(mut text: &str) -> Vec<u8> {
    let mut token = Vec::new();
    while let Some((before, behind)) = text.split_once('\\') {
        token.extend_from_slice(before.as_bytes());
        let length = if let Some(digits) = behind.strip_prefix('x') {
            token.push(u8::from_str_radix(&digits[..2], 16).unwrap());
            3
        } else {
            token.push(behind.as_bytes()[0]);
            1
        };
        text = &behind[length..];
    }
    token.extend_from_slice(text.as_bytes());
    token
}

#[test]
fn every_target_is_a_binary_of_cargo_fuzz() {
    let manifest = fs::read_to_string(package().join("Cargo.toml")).unwrap();
    for (name, _) in TARGETS {
        let path = format!("fuzz_targets/{name}.rs");
        let text = fs::read_to_string(package().join(&path)).unwrap_or_default();
        assert!(text.contains(&format!("target!({name})")), "{path} must run {name}");
        let entry = format!("name = \"{name}\"\npath = \"{path}\"");
        assert!(manifest.contains(&entry), "fuzz/Cargo.toml must have a [[bin]] with\n{entry}");
    }
    assert_eq!(manifest.matches("[[bin]]").count(), TARGETS.len());
}

#[test]
fn a_token_is_read_as_libfuzzer_reads_it() {
    assert_eq!(unescaped(r#"a\x0d\x0A\"\\b"#), b"a\r\n\"\\b");
    assert!(tokens().len() > 50);
}
