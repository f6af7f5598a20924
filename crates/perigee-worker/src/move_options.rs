//! Options for sessions that change replicas: how long a replica waits for answers, routers and askers. Only a replica's
//! leader acts on them.

use std::time::Duration;

use perigee_engine::moves::{FollowPolicy, Way};

/// Longest time that any of these options may name.
const LONGEST: Duration = Duration::from_secs(3600);

/// How a leader treats sessions that move, and those that have latents on other replicas.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct MoveOptions {
    /// Milliseconds that a step waits for the answers of other replicas; sessions without an answer repeat the step.
    #[arg(long, default_value_t = 250)]
    pub attend_deadline_ms: u64,
    /// Steps in a row without an answer, after which a session's latents are computed again.
    #[arg(long, default_value_t = 3)]
    pub attend_misses: u32,
    /// Milliseconds without a word from the router or the other side, after which a session that is being moved is parked.
    #[arg(long, default_value_t = 2000)]
    pub move_silence_ms: u64,
    /// Seconds that a parked session is kept for its router, and latents for a session that runs elsewhere and does not
    /// ask for them.
    #[arg(long, default_value_t = 10)]
    pub move_grace: u64,
    /// Which latents follow a session that came without them: those that cost less to bring than to ask about, or none.
    #[arg(long, value_enum, default_value_t = PagesFollow::ByCost)]
    pub pages_follow: PagesFollow,
    /// Ways by which a session's state may go to its target, best first: copied from slot to slot between GPUs of one machine
    /// (ipc), by a link of its own between the ranks (pair: NCCL between GPUs, loopback between CPUs of one machine), in the
    /// stream (grpc), which is the last resort in any case. Both replicas must allow a way; the target chooses.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [HandoffWay::Ipc, HandoffWay::Grpc])]
    pub handoff: Vec<HandoffWay>,
}

/// A way by which a state goes; see [`Way`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum HandoffWay {
    /// From slot to slot, between GPUs of one machine.
    Ipc,
    /// By a pair of ranks.
    Pair,
    /// In the stream, through host memory.
    Grpc,
}

impl From<HandoffWay> for Way {
    fn from(option: HandoffWay) -> Self {
        match option {
            HandoffWay::Ipc => Self::Slots,
            HandoffWay::Pair => Self::Pair,
            HandoffWay::Grpc => Self::Stream,
        }
    }
}

impl HandoffWay {
    fn name(self) -> &'static str {
        match self {
            Self::Ipc => "ipc",
            Self::Pair => "pair",
            Self::Grpc => "grpc",
        }
    }
}

/// See [`FollowPolicy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PagesFollow {
    /// Those that cost less to bring than to ask about.
    ByCost,
    /// None but those that their home calls back.
    Never,
}

impl From<PagesFollow> for FollowPolicy {
    fn from(option: PagesFollow) -> Self {
        match option {
            PagesFollow::ByCost => Self::ByCost,
            PagesFollow::Never => Self::Never,
        }
    }
}

impl PagesFollow {
    fn name(self) -> &'static str {
        match self {
            Self::ByCost => "by-cost",
            Self::Never => "never",
        }
    }
}

impl Default for MoveOptions {
    fn default() -> Self {
        Self {
            attend_deadline_ms: 250,
            attend_misses: 3,
            move_silence_ms: 2000,
            move_grace: 10,
            pages_follow: PagesFollow::ByCost,
            handoff: vec![HandoffWay::Ipc, HandoffWay::Grpc],
        }
    }
}

impl MoveOptions {
    /// The same options as arguments of a worker process.
    pub fn to_arguments(&self) -> Vec<String> {
        vec![
            format!("--attend-deadline-ms={}", self.attend_deadline_ms),
            format!("--attend-misses={}", self.attend_misses),
            format!("--move-silence-ms={}", self.move_silence_ms),
            format!("--move-grace={}", self.move_grace),
            format!("--pages-follow={}", self.pages_follow.name()),
            format!("--handoff={}", self.handoff.iter().map(|way| way.name()).collect::<Vec<_>>().join(",")),
        ]
    }

    /// All faults; `step_timeout` is how long a rank may be silent inside a step.
    pub fn faults(&self, step_timeout: Duration) -> Vec<String> {
        let mut faults = Vec::new();
        for (name, found) in [
            ("--attend-deadline-ms", self.attend_deadline()),
            ("--move-silence-ms", self.silence()),
            ("--move-grace", self.grace()),
        ] {
            if found.is_zero() || found > LONGEST {
                faults.push(format!("{name}: expected above 0 and up to {LONGEST:?}, found {found:?}"));
            }
        }
        if self.attend_deadline() >= step_timeout {
            let found = self.attend_deadline();
            faults.push(format!(
                "--attend-deadline-ms: a step that waits {found:?} fails after --step-timeout ({step_timeout:?})"
            ));
        }
        if self.attend_misses == 0 {
            faults.push("--attend-misses: expected at least 1, found 0".into());
        }
        faults
    }

    /// The ways of states, best first.
    pub fn ways(&self) -> Vec<Way> {
        self.handoff.iter().copied().map(Way::from).collect()
    }

    /// How long a step waits for answers.
    pub fn attend_deadline(&self) -> Duration {
        Duration::from_millis(self.attend_deadline_ms)
    }

    /// How long a move waits for whoever should go on with it.
    pub fn silence(&self) -> Duration {
        Duration::from_millis(self.move_silence_ms)
    }

    /// How long something is kept for somebody who may come back.
    pub fn grace(&self) -> Duration {
        Duration::from_secs(self.move_grace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_secs(30);

    #[test]
    fn defaults_are_good_and_odd_values_are_named() {
        assert_eq!(MoveOptions::default().faults(STEP), Vec::<String>::new());
        let good = MoveOptions::default();
        for (options, name) in [
            (MoveOptions { attend_deadline_ms: 0, ..good.clone() }, "--attend-deadline-ms"),
            (MoveOptions { attend_deadline_ms: 30_000, ..good.clone() }, "--attend-deadline-ms"),
            (MoveOptions { attend_misses: 0, ..good.clone() }, "--attend-misses"),
            (MoveOptions { move_silence_ms: 0, ..good.clone() }, "--move-silence-ms"),
            (MoveOptions { move_grace: 3601, ..good.clone() }, "--move-grace"),
        ] {
            let faults = options.faults(STEP);
            assert_eq!(faults.len(), 1, "{faults:?}");
            assert!(faults[0].starts_with(name), "{faults:?}");
        }
    }

    #[test]
    fn a_child_gets_the_same_options() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            moves: MoveOptions,
        }
        let parse = |arguments: Vec<String>| {
            let line = std::iter::once("worker".to_owned()).chain(arguments);
            <Line as clap::Parser>::try_parse_from(line).expect("known options").moves
        };
        let options = MoveOptions {
            attend_deadline_ms: 7,
            attend_misses: 2,
            move_silence_ms: 900,
            move_grace: 1,
            pages_follow: PagesFollow::Never,
            handoff: vec![HandoffWay::Pair, HandoffWay::Ipc],
        };
        assert_eq!(parse(options.to_arguments()), options);
        assert_eq!(parse(Vec::new()), MoveOptions::default());
    }
}
