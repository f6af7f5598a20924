//! Random walks: sessions that move at random between replicas that lose, double and refuse messages and die, with seeds
//! that are printed. Clients assert every index; in the end nothing is held.

use perigee_proto::v1::MigrateMode;

use super::actor::{Fate, Said, TICK};
use super::scene::Scene;
use crate::RouterConfig;

/// Numbers from a seed (splitmix64, Steele, Lea and Flood 2014).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit as u64) as usize
    }
}

const MESSAGES: [Said; 11] = [
    Said::Prepare,
    Said::Start,
    Said::Release,
    Said::AbortMove,
    Said::Abort,
    Said::Ready,
    Said::Started,
    Said::Released,
    Said::Aborted,
    Said::Failed,
    Said::Handoff,
];

async fn walk(seed: u64) -> (u64, u64) {
    println!("seed {seed}");
    let mut numbers = Numbers(seed);
    let mut scene = Scene::start(RouterConfig::default()).await;
    let choices = 1 + numbers.below(2) as u32;
    let client = scene.client(choices).await;
    let names = ["a", "b", "c"];
    let mut lives = 2;
    for _ in 0..5 {
        for _ in 0..numbers.below(3) {
            let fates = [Fate::Lost, Fate::Lost, Fate::Doubled, Fate::Doubled, Fate::Refused, Fate::Last];
            let fate = fates[numbers.below(fates.len())];
            // One of the three stays, so that the session always has somewhere to go.
            let actor = if fate == Fate::Last && lives == 2 { "b" } else { names[numbers.below(3)] };
            if fate == Fate::Last {
                if lives == 0 {
                    continue;
                }
                lives = 0;
            }
            let fate = if fate == Fate::Last && actor != "b" { Fate::Lost } else { fate };
            scene.actor(actor).fate(MESSAGES[numbers.below(MESSAGES.len())], fate);
        }
        let session = client.sessions[numbers.below(choices as usize)].clone();
        let mode = [MigrateMode::Split, MigrateMode::Whole][numbers.below(2)];
        let moving = scene.migrate(&session, names[numbers.below(3)], mode);
        tokio::time::sleep(TICK * numbers.below(20) as u32).await;
        match numbers.below(8) {
            // The operator goes away.
            0 => moving.abort(),
            1 if lives > 0 => {
                scene.kill("c");
                lives = 0;
            }
            _ => {}
        }
    }
    client.read().await.is_complete(choices);
    scene.all_is_free(false).await;
    let moved = scene.count("split", "done") + scene.count("whole", "done");
    (moved, scene.count("replay", "done"))
}

#[tokio::test(start_paused = true)]
async fn random_walks_keep_every_promise() {
    let (mut moved, mut replayed) = (0, 0);
    for seed in 0..60 {
        let (moves, replays) = walk(seed).await;
        (moved, replayed) = (moved + moves, replayed + replays);
    }
    println!("{moved} moves, {replayed} replays");
    assert!(moved > 60 && replayed > 0, "{moved} moves, {replayed} replays");
}
