//! What a byte costs on its way through our own cores, in instructions, which are the same on every run.
//!
//! Each pump moves eight mebibytes from a writer to a reader through cores of floor 1, as the drivers above them do:
//! the mux alone, the mux over a link, and the frames of a WebSocket. A child process does the same under valgrind's
//! callgrind, which counts the instructions of culvert's functions within the pump; they may not differ by more than 3 % from what stands
//! below. Whoever makes a path cheaper, or has a reason to make it dearer, writes down the new number:
//! `cargo test --test instructions -- --nocapture` prints it. The numbers are those of the test profile; a release
//! build counts fewer (`cargo test --release`, for the ratio of one layer to another).

#![allow(clippy::unwrap_used, reason = "a helper of a test fails the test")]

use std::{collections::HashMap, process::Command, time::Instant};

use bytes::BytesMut;
use culvert::proto::{
    link, websocket,
    yamux::{self, Key, Options, Reading, Role, Writing},
};

/// Moves the bytes; says how many arrived.
type Pump = fn() -> usize;
/// The pumps, and instructions per KiB that they cost in the test profile.
const COSTS: [(&str, Pump, f64); 3] =
    [("mux", pumped_mux, 104.7), ("link_and_mux", pumped_link_and_mux, 136.2), ("websocket", pumped_websocket, 377.8)];
/// How far a count may be from the number above: hash maps have random keys.
const TOLERANCE: f64 = 0.03;
const BYTES: usize = 8 << 20;
/// What a flow reads from its socket at once.
const WRITE: usize = 64 * 1024;
/// Which pump a child shall run.
const CHILD: &str = "CULVERT_PUMP";

/// One mux from its writer's end to its reader's.
struct Mux {
    near: yamux::Core,
    far: yamux::Core,
    writer: Key,
    reader: Option<Key>,
    text: Vec<u8>,
    written: usize,
    read: usize,
}

impl Mux {
    fn new() -> Self {
        let mut near = yamux::Core::new(Options::new(Role::Client));
        let far = yamux::Core::new(Options::new(Role::Server));
        let writer = near.open(Instant::now()).unwrap();
        let text = (0..WRITE).map(|n| n as u8).collect();
        Self { near, far, writer, reader: None, text, written: 0, read: 0 }
    }

    /// The writer's flow has its turn.
    fn write(&mut self) {
        let wanted = WRITE.min(BYTES - self.written);
        if let Writing::Taken(taken) = self.near.write(&self.writer, &self.text[..wanted]) {
            self.written += taken;
        }
    }

    /// The reader's side takes a turn of the mux, and its flow what came.
    fn receive(&mut self, bytes: &[u8]) {
        self.far.handle_input(Instant::now(), bytes).unwrap();
        self.reader = self.reader.take().or_else(|| self.far.accept());
        let Some(reader) = &self.reader else { return };
        while let Reading::Data(data) = self.far.read(reader) {
            let count = data.len();
            self.far.consume(reader, count);
            self.read += count;
        }
    }
}

#[inline(never)]
fn pumped_mux() -> usize {
    let (mut mux, mut turn) = (Mux::new(), BytesMut::new());
    while mux.read < BYTES {
        mux.write();
        turn.clear();
        mux.near.poll_transmit(Instant::now(), &mut turn);
        mux.receive(&turn);
        turn.clear();
        mux.far.poll_transmit(Instant::now(), &mut turn);
        mux.near.handle_input(Instant::now(), &turn).unwrap();
    }
    mux.read
}

/// Takes the frames of one end of a link to the other; gives the payload that came, as the driver's reader gets it.
fn carry(from: &mut link::Core, to: &mut link::Core, mut each: impl FnMut(&[u8])) {
    let now = Instant::now();
    while let Some(frame) = from.poll_transmit(now) {
        to.handle_input(now, 1, &frame.head).unwrap();
        let room = to.direct_room();
        assert_eq!(room, frame.payload.len());
        if room > 0 {
            to.direct(now, room);
            each(&frame.payload);
        }
    }
}

#[inline(never)]
fn pumped_link_and_mux() -> usize {
    let (mut mux, mut turn) = (Mux::new(), BytesMut::new());
    let options = link::Options { receive_window: 32 << 20, peer_window: 32 << 20, ..link::Options::default() };
    let [mut near, mut far] = [0; 2].map(|_| link::Core::new(Instant::now(), options));
    for core in [&mut near, &mut far] {
        core.attach(Instant::now(), 1, link::Positions::default()).unwrap();
    }
    while mux.read < BYTES {
        mux.write();
        turn.clear();
        turn.reserve(yamux::TURN);
        mux.near.poll_transmit(Instant::now(), &mut turn);
        while !turn.is_empty() {
            near.write_block(&mut turn);
            near.flush();
            carry(&mut near, &mut far, |payload| mux.receive(payload));
            carry(&mut far, &mut near, |_| {});
        }
        turn.clear();
        mux.far.poll_transmit(Instant::now(), &mut turn);
        far.write(&turn);
        far.flush();
        carry(&mut far, &mut near, |payload| mux.near.handle_input(Instant::now(), payload).unwrap());
        carry(&mut near, &mut far, |_| {});
    }
    mux.read
}

#[inline(never)]
fn pumped_websocket() -> usize {
    let text: Vec<u8> = (0..WRITE - 512).map(|n| n as u8).collect();
    let mut decoder = websocket::Decoder::new(websocket::End::Client);
    let (mut frame, mut read) = (Vec::new(), 0);
    while read < BYTES {
        let mask = websocket::Mask::new([1, 2, 3, 4]);
        frame.clear();
        frame.extend_from_slice(&[0; websocket::HEADROOM]);
        { mask }.copy(&text, &mut frame);
        let payload = websocket::HEADROOM..frame.len();
        let start = websocket::put_header(&mut frame, &payload, Some(mask));
        let end = frame.len();
        read += decoder.strip(&mut frame, start..end).0.len();
    }
    read
}

#[test]
fn what_is_pumped_arrives() {
    let wanted = std::env::var(CHILD).ok();
    for (name, pump, _) in COSTS {
        if wanted.as_deref().is_none_or(|wanted| wanted == name) {
            assert!(pump() >= BYTES, "{name}");
        }
    }
}

#[test]
fn a_byte_costs_what_it_did() {
    let mut wrong = Vec::new();
    for (name, _, committed) in COSTS {
        let counted = count(name);
        println!("{name}: {counted:.1} instructions per KiB, {committed:.1} committed");
        if (counted / committed - 1.0).abs() > TOLERANCE {
            wrong.push(format!("{name} costs {counted:.1} instructions per KiB instead of {committed:.1}"));
        }
    }
    assert!(wrong.is_empty(), "{}; see the head of this file", wrong.join(", "));
}

/// Instructions per KiB of culvert's own functions within a pump. Those of the C library are left out: which of its ways
/// to copy it takes depends on the processor, and valgrind counts some by the byte.
fn count(name: &str) -> f64 {
    let file = std::env::temp_dir().join(format!("culvert-callgrind-{}-{name}", std::process::id()));
    let mut command = Command::new("valgrind");
    command.arg("--tool=callgrind").arg(format!("--callgrind-out-file={}", file.display()));
    command.arg(format!("--toggle-collect=instructions::pumped_{name}"));
    command.arg(std::env::current_exe().unwrap()).args(["--exact", "what_is_pumped_arrives"]).env(CHILD, name);
    let output = command.output().expect("valgrind runs: apt-get install valgrind");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let profile = std::fs::read_to_string(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    own_cost(&profile) as f64 / (BYTES / 1024) as f64
}

/// Sums what functions of culvert cost by themselves, in callgrind's format: `fn=(7) name` (the name only where the
/// number is new), lines of position and cost, and after a `calls=` line one with the cost of what was called.
fn own_cost(profile: &str) -> u64 {
    let (mut names, mut ours, mut sum) = (HashMap::new(), false, 0);
    let mut lines = profile.lines();
    while let Some(line) = lines.next() {
        let function = ["fn=", "cfn="].iter().find_map(|word| line.strip_prefix(word).map(|rest| (*word, rest)));
        if let Some((word, rest)) = function {
            let (id, name) = rest.split_once(' ').unwrap_or((rest, ""));
            if !name.is_empty() {
                names.insert(id, name.contains("culvert::"));
            }
            if word == "fn=" {
                ours = names.get(id).copied().unwrap_or_default();
            }
        } else if line.starts_with("calls=") {
            lines.next();
        } else if ours && line.starts_with(|c: char| c.is_ascii_digit() || "+-*".contains(c)) {
            sum += line.split(' ').nth(1).and_then(|cost| cost.parse::<u64>().ok()).unwrap_or_default();
        }
    }
    sum
}
