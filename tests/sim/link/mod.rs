//! The simulation of the link: two cores, their hellos, carriers that are cut anywhere, and a virtual clock.
//!
//! Part of the library's unit tests (see `src/proto/link/mod.rs`), because the planted faults exist only there. Run it
//! with `cargo nextest run --lib link::sim`; `CULVERT_SIM_SEEDS=100000` runs more schedules than the 20,000 of CI, and
//! `CULVERT_SIM_SEED=N` runs one and tells its story.

mod world;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use self::world::{Outcome, World};
use super::Fault;

/// Schedules that CI runs.
const SEEDS: u64 = 20_000;

/// Schedules within which each planted fault must be found.
const FAULT_SEEDS: u64 = 2_000;

#[derive(Default)]
struct Tally {
    complete: AtomicU64,
    lost: AtomicU64,
    cuts: AtomicU64,
    bytes: AtomicU64,
    replayed: AtomicU64,
}

#[test]
fn every_schedule_completes_or_says_that_the_session_is_lost() {
    let started = Instant::now();
    let seeds = match (number("CULVERT_SIM_SEED"), number("CULVERT_SIM_SEEDS")) {
        (Some(seed), _) => vec![seed],
        (None, count) => (0..count.unwrap_or(SEEDS)).chain([random_seed()]).collect(),
    };
    let tally = Tally::default();
    let next = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    play(*seed, &tally);
                }
            });
        }
    });
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!(
        "{} schedules in {:.1?}: {} complete, {} session lost; {} cuts, {} bytes delivered, {} sent again",
        seeds.len(),
        started.elapsed(),
        count(&tally.complete),
        count(&tally.lost),
        count(&tally.cuts),
        count(&tally.bytes),
        count(&tally.replayed),
    );
    assert!(seeds.len() == 1 || count(&tally.lost) * 4 < seeds.len() as u64, "too many lost sessions to prove much");
    assert!(seeds.len() == 1 || count(&tally.cuts) >= 20 * count(&tally.complete), "too few cuts");
}

fn play(seed: u64, tally: &Tally) {
    let mut world = World::new(seed, None);
    let outcome = world.run().unwrap_or_else(|error| panic!("CULVERT_SIM_SEED={seed}: {error}\n{}", world.story()));
    let counter = if outcome == Outcome::Complete { &tally.complete } else { &tally.lost };
    counter.fetch_add(1, Ordering::Relaxed);
    tally.cuts.fetch_add(world.cuts, Ordering::Relaxed);
    tally.bytes.fetch_add(world.delivered(), Ordering::Relaxed);
    tally.replayed.fetch_add(world.replayed, Ordering::Relaxed);
}

/// A fixed set finds what it always finds; one more seed may find something new.
fn random_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let seed = now.as_nanos() as u64;
    println!("random seed: CULVERT_SIM_SEED={seed}");
    seed
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

fn is_found(fault: Fault) {
    let found = (0..FAULT_SEEDS).find_map(|seed| {
        let run = AssertUnwindSafe(|| World::new(seed, Some(fault)).run());
        match catch_unwind(run) {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some((seed, error)),
            Err(_) => Some((seed, "a panic".to_owned())),
        }
    });
    let (seed, error) = found.unwrap_or_else(|| panic!("{fault:?} was not found"));
    println!("{fault:?}: found by seed {seed}: {error}");
}

#[test]
fn a_replay_that_skips_a_frame_is_found() {
    is_found(Fault::ReplaySkipsAFrame);
}

#[test]
fn an_acknowledgement_too_early_is_found() {
    is_found(Fault::AckTooEarly);
}

#[test]
fn an_unbounded_replay_buffer_is_found() {
    is_found(Fault::UnboundedReplay);
}

#[test]
fn an_old_carrier_that_is_not_fenced_is_found() {
    is_found(Fault::NotFenced);
}

#[test]
fn a_proof_that_is_not_checked_is_found() {
    is_found(Fault::ProofNotChecked);
}

#[test]
fn a_reset_that_reads_as_an_end_is_found() {
    is_found(Fault::ResetReadsAsEof);
}
