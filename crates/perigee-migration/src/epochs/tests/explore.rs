//! Searches the system of `world.rs`: all of its states within a budget of faults, and long random walks beyond it. In
//! every state at most one replica steps the accepted epoch, accounts of slots and pages are right, and tokens come in
//! order; from every state, left in peace, the session ends with all its tokens and nothing is left of it.

use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};

use super::super::Outcome;
use super::world::World;
use crate::testing::noise;

/// What a search came across.
#[derive(Default)]
struct Seen {
    states: usize,
    settled: usize,
    outcomes: [usize; 4],
    router_deaths: usize,
}

impl Seen {
    fn count(&mut self, world: &World) {
        for outcome in &world.outcomes {
            let index = match outcome {
                Outcome::Moved => 0,
                Outcome::Aborted => 1,
                Outcome::Replayed => 2,
                Outcome::Ended => 3,
            };
            self.outcomes[index] += 1;
        }
        self.router_deaths += usize::from(world.is_router_dead);
    }
}

fn settles(world: &World) {
    if world.is_anyone_alive() {
        let mut rest = world.clone();
        rest.settle();
        assert!(rest.is_settled(), "left in peace from {world:#?}\nit came to {rest:#?}");
    }
}

/// All states of a session of so many tokens that so many moves and faults can lead to; one in `sample` is brought to rest.
fn search((moves, faults, tokens): (u8, u8, u8), sample: u64) -> Seen {
    let hasher = BuildHasherDefault::<DefaultHasher>::default();
    let mut seen = Seen::default();
    let mut known = HashSet::new();
    let mut open = VecDeque::from([World::new(moves, faults, tokens)]);
    while let Some(world) = open.pop_front() {
        let hash = hasher.hash_one(&world);
        if !known.insert(hash) {
            continue;
        }
        seen.states += 1;
        seen.count(&world);
        if hash % sample == 0 {
            settles(&world);
            seen.settled += 1;
        }
        for step in world.steps() {
            let mut next = world.clone();
            next.take(&step);
            if !known.contains(&hasher.hash_one(&next)) {
                open.push_back(next);
            }
        }
    }
    seen
}

/// Every state is brought to rest.
#[test]
fn every_order_of_events_with_one_fault() {
    let seen = search((1, 1, 3), 1);
    assert_eq!(seen.states, seen.settled);
    assert!(seen.states > 10_000, "{}", seen.states);
    assert!(seen.outcomes.iter().all(|&count| count > 0) && seen.router_deaths > 0, "{:?}", seen.outcomes);
}

/// Among them the way there and back.
#[test]
fn every_order_of_events_of_two_moves() {
    let seen = search((2, 0, 3), 1);
    assert!(seen.states > 1000 && seen.outcomes[0] > 1000, "{:?}", seen.outcomes);
}

#[test]
fn every_order_of_events_with_two_faults() {
    let seen = search((1, 2, 2), 10);
    assert!(seen.states > 100_000, "{}", seen.states);
    assert!(seen.outcomes.iter().all(|&count| count > 1000) && seen.router_deaths > 1000, "{:?}", seen.outcomes);
}

/// Up to five moves and eight faults at random.
#[test]
fn random_walks_with_many_moves_and_faults() {
    let (walks, seed) = (20_000, 5);
    println!("{walks} walks from seed {seed}");
    let (mut seen, mut longest) = (Seen::default(), 0);
    for walk in 0..walks {
        let mut random = noise(seed << 32 | walk, 1 << 10).into_iter();
        let mut draw = |below: usize| random.next().map_or(0, usize::from) * below / 256;
        let mut world = World::new(draw(5) as u8 + 1, draw(9) as u8, 4);
        for _ in 0..draw(200) {
            let (faults, others): (Vec<_>, Vec<_>) = world.steps().into_iter().partition(|step| step.is_fault());
            // Faults are many and would come first; of the rest, endings and losses of time would.
            let is_patient = draw(8) > 0;
            let patient: Vec<_> = others.iter().filter(|step| !is_patient || !step.is_ending()).cloned().collect();
            let steps = if draw(10) == 0 && !faults.is_empty() { faults } else { patient };
            if steps.is_empty() {
                break;
            }
            world.take(&steps[draw(steps.len())]);
        }
        settles(&world);
        longest = longest.max(world.outcomes.iter().filter(|outcome| **outcome == Outcome::Moved).count());
        seen.count(&world);
    }
    let [moved, aborted, replayed, ended] = seen.outcomes;
    assert!(longest >= 4, "at most {longest} moves in a walk");
    assert!(moved.min(aborted).min(replayed).min(seen.router_deaths) > 1000, "{:?}", seen.outcomes);
    assert!(ended > 50, "{ended}");
}
