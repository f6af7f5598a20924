//! The balancer: sessions that run leave replicas whose steps are slow, or whose pages or slots are short, for others that
//! are better off, where that is worth what the move costs.
//!
//! | file | what |
//! | --- | --- |
//! | `view.rs` | what is known: loads, sessions of this router, ways between replicas |
//! | `steps.rs` | how long a step of a replica would take with other sessions |
//! | `cost.rs` | what a move takes, and what goes along |
//! | `policy.rs` | a view in, moves out |
//! | `run.rs` | looks once a second, and orders the moves as an operator would |
//!
//! All but `run` are functions of what they are given: no clock, no chance, no I/O. A replica with `n` sessions of `c` tokens
//! in all is predicted to take `t = base + row n + token c` for a step, from what it took before. With `u` the share of its
//! pages in use and `q` its sessions, waiting ones too, for each slot, the policy has the greedy way down the sum over all
//! replicas of
//!
//! `(t / mean t)² + pages (u / mean u)² + slots (q / mean q)²`
//!
//! where `pages` is the fullest replica's share and `slots` is 0 up to four fifths of all slots and 1 where all are taken.
//! Squares make the worst replica count most, and a move that would only exchange the roles of two replicas worth nothing.
//! It begins where the largest of the three is a quarter above its mean, in two looks in a row, and goes on until it is a
//! tenth above; few moves go on at once, and a session moves at most once a minute.
//!
//! *Several routers* see the same loads, and each has only its own sessions. A router that owns a share `s` of a replica's
//! sessions takes one away in a look with probability `s`, so that all of them together take away one.

mod cost;
mod policy;
mod run;
mod steps;
#[cfg(test)]
mod tests;
mod view;

pub(crate) use view::Way;

/// What the balancer does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Balance {
    /// Nothing.
    #[default]
    Off,
    /// It says what it would do, and why.
    DryRun,
    /// It moves sessions.
    On,
}
