//! What must change so that the running forwards become the wanted ones.
//!
//! Owns the comparison. Does nothing itself. Invariant: applying the steps and planning again yields no step, except
//! for rules that could not be opened, which are tried again.

use std::collections::{BTreeMap, BTreeSet};

use crate::{base::Name, config::ForwardRule};

/// A forward as it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// The rule it follows.
    pub rule: ForwardRule,
    /// False if its listener could not be opened.
    pub is_listening: bool,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Close the listener of this rule; its flows drain.
    Close(Name),
    /// Open a listener for this rule.
    Open(ForwardRule),
    /// Keep the listener and its flows; new connections follow this rule.
    Retarget(ForwardRule),
}

/// The steps from running to wanted: closings first, so that an address can move from one rule to another.
pub fn plan(running: &BTreeMap<Name, Running>, desired: &[ForwardRule]) -> Vec<Step> {
    let wanted: BTreeSet<&Name> = desired.iter().map(|rule| &rule.name).collect();
    let mut closings: Vec<Step> =
        running.keys().filter(|name| !wanted.contains(name)).cloned().map(Step::Close).collect();
    let mut rest = Vec::new();
    for rule in desired {
        match running.get(&rule.name) {
            Some(current) if current.rule == *rule && current.is_listening => {}
            Some(current) if current.is_listening && current.rule.listen == rule.listen => {
                rest.push(Step::Retarget(rule.clone()));
            }
            Some(_) => {
                closings.push(Step::Close(rule.name.clone()));
                rest.push(Step::Open(rule.clone()));
            }
            None => rest.push(Step::Open(rule.clone())),
        }
    }
    // Opens before retargets: a new rule must not wait behind the bookkeeping of old ones.
    rest.sort_by_key(|step| matches!(step, Step::Retarget(_)));
    closings.append(&mut rest);
    closings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(name: &str, listen: &str, target: &str) -> ForwardRule {
        let parsed = (name.parse().unwrap(), listen.parse().unwrap());
        ForwardRule::new(parsed.0, parsed.1, "pump-17".parse().unwrap(), target.parse().unwrap())
    }

    fn running(rules: &[(ForwardRule, bool)]) -> BTreeMap<Name, Running> {
        let entry = |(rule, is_listening): &(ForwardRule, bool)| {
            (rule.name.clone(), Running { rule: rule.clone(), is_listening: *is_listening })
        };
        rules.iter().map(entry).collect()
    }

    #[test]
    fn a_table_of_changes_and_the_steps_they_need() {
        let a = rule("a", "127.0.0.1:1001", "ssh");
        let moved = rule("a", "127.0.0.1:1002", "ssh");
        let retargeted = rule("a", "127.0.0.1:1001", "web");
        let b = rule("b", "127.0.0.1:1001", "ssh");
        let close_a = Step::Close(a.name.clone());
        for (name, before, after, steps) in [
            ("nothing", vec![(a.clone(), true)], vec![a.clone()], vec![]),
            ("added", vec![], vec![a.clone()], vec![Step::Open(a.clone())]),
            ("removed", vec![(a.clone(), true)], vec![], vec![close_a.clone()]),
            ("moved", vec![(a.clone(), true)], vec![moved.clone()], vec![close_a.clone(), Step::Open(moved)]),
            ("retargeted", vec![(a.clone(), true)], vec![retargeted.clone()], vec![Step::Retarget(retargeted)]),
            ("port was taken", vec![(a.clone(), false)], vec![a.clone()], vec![close_a.clone(), Step::Open(a.clone())]),
            ("address handed on", vec![(a, true)], vec![b.clone()], vec![close_a, Step::Open(b)]),
        ] {
            assert_eq!(plan(&running(&before), &after), steps, "{name}");
        }
    }
}
