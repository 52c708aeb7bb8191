//! The bound on replay memory over all links of a process.
//!
//! Owns the account. Does not know what is held. Invariant: what all links have reserved never exceeds the total.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::wakers::Wakers;

/// Reservations are made in steps, so that a flow does not visit the account for each frame: one full frame.
const STEP: usize = 64 * 1024;

/// What all links may hold: eight links at full speed over a long path, or thousands at the pace of a shell.
const DEFAULT_TOTAL: usize = 256 * 1024 * 1024;

/// What one link may hold: 2.5 Gbit/s at 100 ms.
const DEFAULT_PER_LINK: usize = 32 * 1024 * 1024;

/// Machines (or control groups) with less memory than this get the small ceiling.
const SMALL_MACHINE: u64 = 256 * 1024 * 1024;

/// What one link may hold on a small machine: 300 Mbit/s at 100 ms.
const SMALL_PER_LINK: usize = 4 * 1024 * 1024;

/// A bound on the replay memory of all links of a process. Clones share one account.
#[derive(Clone, Debug)]
pub struct ReplayBudget(Arc<Account>);

#[derive(Debug)]
struct Account {
    total: usize,
    per_link: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    reserved: usize,
    waiting: Vec<Arc<Wakers>>,
}

impl Default for ReplayBudget {
    fn default() -> Self {
        Self::new(DEFAULT_TOTAL, DEFAULT_PER_LINK)
    }
}

impl ReplayBudget {
    /// A budget of `total` bytes over all links, of which one link takes at most `per_link`.
    pub fn new(total: usize, per_link: usize) -> Self {
        Self(Arc::new(Account { total, per_link: per_link.min(total), state: Mutex::default() }))
    }

    /// The default for this machine and the memory limit of its control group.
    pub fn for_this_machine() -> Self {
        match memory_limit() {
            Some(limit) if limit < SMALL_MACHINE => Self::new((limit / 8) as usize, SMALL_PER_LINK),
            _ => Self::default(),
        }
    }

    /// What one link takes at most. A good receive window, too: it is what the other side may have on the way to us.
    pub fn per_link(&self) -> usize {
        self.0.per_link
    }

    /// What all links have reserved at present.
    pub fn reserved(&self) -> usize {
        self.state().reserved
    }

    pub(super) fn reservation(&self) -> Reservation {
        Reservation { budget: self.clone(), amount: 0 }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One link's share. Dropping it gives everything back.
#[derive(Debug)]
pub(super) struct Reservation {
    budget: ReplayBudget,
    amount: usize,
}

impl Reservation {
    /// Makes sure that `bytes` are reserved. If that is impossible now, `wakers` are woken when something was given back.
    pub(super) fn cover(&mut self, bytes: usize, wakers: &Arc<Wakers>) -> bool {
        if bytes <= self.amount {
            return true;
        }
        let wanted = bytes.next_multiple_of(STEP);
        let mut state = self.budget.state();
        if state.reserved + (wanted - self.amount) > self.budget.0.total {
            if !state.waiting.iter().any(|known| Arc::ptr_eq(known, wakers)) {
                state.waiting.push(Arc::clone(wakers));
            }
            return false;
        }
        state.reserved += wanted - self.amount;
        drop(state);
        self.amount = wanted;
        true
    }

    /// Gives back what `bytes` do not need, leaving a little so that a steady flow rarely comes here.
    pub(super) fn trim(&mut self, bytes: usize) {
        let needed = bytes.next_multiple_of(STEP);
        let slack = if bytes == 0 { 0 } else { 4 * STEP };
        if self.amount > needed + slack {
            self.give_back(self.amount - needed);
        }
    }

    fn give_back(&mut self, bytes: usize) {
        self.amount -= bytes;
        let mut state = self.budget.state();
        state.reserved -= bytes;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        waiting.iter().for_each(|wakers| wakers.wake_both());
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.amount > 0 {
            self.give_back(self.amount);
        }
    }
}

/// Memory of this machine or of its control group, whichever is less; `None` if neither can be read.
fn memory_limit() -> Option<u64> {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let kibibytes = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        kibibytes.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    });
    let group = own_group().and_then(|path| std::fs::read_to_string(path).ok());
    let group = group.and_then(|text| text.trim().parse().ok());
    [machine, group].into_iter().flatten().min()
}

/// The file with the memory limit of this process's control group (version 2).
fn own_group() -> Option<String> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    Some(format!("/sys/fs/cgroup{}/memory.max", path.trim_end_matches('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_links_reserve_stays_within_the_total() {
        let budget = ReplayBudget::new(4 * STEP, 4 * STEP);
        let wakers = Arc::new(Wakers::default());
        let (mut one, mut other) = (budget.reservation(), budget.reservation());
        assert!(one.cover(3 * STEP, &wakers));
        assert!(other.cover(1, &wakers));
        assert!(!other.cover(STEP + 1, &wakers));
        assert_eq!(budget.reserved(), 4 * STEP);
        one.trim(0);
        assert!(other.cover(STEP + 1, &wakers));
        drop((one, other));
        assert_eq!(budget.reserved(), 0);
    }

    #[test]
    fn this_machine_says_how_much_memory_it_has() {
        assert!(memory_limit().is_some_and(|limit| limit > 1024 * 1024));
        assert!(ReplayBudget::for_this_machine().per_link() >= SMALL_PER_LINK.min(1024 * 1024));
    }
}
