//! Every parser of bytes from the network, over a committed corpus and over mutations of it, on stable Rust.
//!
//! Owns the list of parsers. Does not know what they check: each is a plain function that panics when something does
//! not hold. Invariant: a parser is here and in `tests/fuzz`, with a corpus, or in neither.

#![allow(clippy::unwrap_used, reason = "a helper of a test fails the test")]

use std::{
    fs,
    panic::{self, AssertUnwindSafe},
    path::PathBuf,
};

/// Enough that a careless parser breaks, few enough for every run of CI; `tests/fuzz` has no such limit.
const MUTATIONS: u64 = 20_000;
/// Longest input that grows from mutations: longer than any limit on what comes before authentication.
const MAX_INPUT: usize = 8192;

type Parser = fn(&[u8]);

const PARSERS: [(&str, Parser); 23] = [
    ("answer", culvert::service::fuzz_answer),
    ("carrier", culvert::transport::carrier::fuzz_carrier),
    ("certificate", culvert::hub::control::fuzz_certificate),
    ("connection_string", culvert::auth::connstr::fuzz_connection_string),
    ("control_socket", culvert::agent::control_socket::fuzz_control_socket),
    ("device", culvert::hub::fuzz_device),
    ("frames", culvert::hub::fuzz_frames),
    ("head", culvert::hub::fuzz_head),
    ("hello", culvert::proto::hello::fuzz_hello),
    ("link", culvert::proto::link::fuzz_link),
    ("login", culvert::hub::control::fuzz_login),
    ("mqtt", culvert::proto::mqtt::fuzz_mqtt),
    ("open", culvert::proto::open::fuzz_open),
    ("path", culvert::hub::fuzz_path),
    ("proxy_answer", culvert::transport::dial::fuzz_proxy_answer),
    ("relay", culvert::hub::fuzz_relay),
    ("request", culvert::hub::fuzz_request),
    ("sas", culvert::auth::sas::fuzz_sas),
    ("session", culvert::hub::fuzz_session),
    ("topics", culvert::proto::control::fuzz_topics),
    ("upgrade", culvert::transport::carrier::fuzz_upgrade),
    ("url", culvert::transport::http::fuzz_url),
    ("yamux", culvert::proto::yamux::fuzz_yamux),
];

fn folder(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz")).join(name)
}

/// The corpus of a parser, in order, so that a seed means the same tomorrow.
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let entries =
        fs::read_dir(folder("corpus").join(name)).unwrap_or_else(|error| panic!("no corpus of {name}: {error}"));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Runs a parser; a panic names the input.
fn feed(name: &str, parser: Parser, input: &[u8]) {
    let done = panic::catch_unwind(AssertUnwindSafe(|| parser(input)));
    assert!(done.is_ok(), "{name} panicked on {:?}", input.escape_ascii().to_string());
}

/// A small generator of numbers, the same on every machine (xorshift64*).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit.max(1)
    }
}

/// One to four careless changes.
fn mutate(numbers: &mut Numbers, corpus: &[Vec<u8>]) -> Vec<u8> {
    const BYTES: [u8; 12] = [0, 1, 0x7f, 0x80, 0xff, b'/', b'%', b'=', b'&', b'\r', b'\n', b'"'];
    let mut input = corpus[numbers.below(corpus.len())].clone();
    for _ in 0..=numbers.below(4) {
        let at = numbers.below(input.len() + 1);
        match numbers.below(7) {
            0 => input.truncate(at),
            1 => input.insert(at, BYTES[numbers.below(BYTES.len())]),
            2 if at < input.len() => drop(input.remove(at)),
            3 if at < input.len() => input[at] = BYTES[numbers.below(BYTES.len())],
            4 if at < input.len() => input[at] ^= 1 << numbers.below(8),
            5 => {
                let other = &corpus[numbers.below(corpus.len())];
                input.truncate(at);
                input.extend_from_slice(&other[numbers.below(other.len())..]);
            }
            _ => {
                let copy = input[at..].to_vec();
                input.extend_from_slice(&copy);
            }
        }
        input.truncate(MAX_INPUT);
    }
    input
}

#[test]
fn no_parser_panics_on_its_corpus_or_near_it() {
    for (name, parser) in PARSERS {
        let corpus = corpus(name);
        for input in &corpus {
            (0..=input.len()).for_each(|cut| feed(name, parser, &input[..cut]));
        }
        let mut numbers = Numbers(0x00c0_1be7);
        for _ in 0..MUTATIONS {
            feed(name, parser, &mutate(&mut numbers, &corpus));
        }
    }
}

#[test]
fn every_parser_has_a_fuzz_target_and_a_corpus() {
    let names = |part: &str| {
        let entries = fs::read_dir(folder(part)).unwrap().map(|entry| entry.unwrap().path());
        let mut names: Vec<String> =
            entries.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
        names.sort();
        names
    };
    let here: Vec<&str> = PARSERS.iter().map(|(name, _)| *name).collect();
    assert_eq!(names("fuzz_targets"), here);
    assert_eq!(names("corpus"), here);
}
