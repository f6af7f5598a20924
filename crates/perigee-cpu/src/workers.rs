//! The threads of one rank. With one thread everything runs inline, which is what several ranks on few cores want; results
//! never depend on the number of threads, because tasks are cut by the work alone and combined in order.

use rayon::prelude::*;

/// A rank's worker threads.
pub(crate) struct Workers {
    pool: Option<rayon::ThreadPool>,
}

impl Workers {
    /// `threads` threads, at least one. Falls back to running inline where the system refuses threads.
    pub(crate) fn new(threads: usize) -> Self {
        if threads <= 1 {
            return Self { pool: None };
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("perigee-cpu-{index}"))
            .build()
            .ok();
        Self { pool }
    }

    /// Number of threads.
    pub(crate) fn threads(&self) -> usize {
        self.pool.as_ref().map_or(1, rayon::ThreadPool::current_num_threads)
    }

    /// Maps items in parallel, results in order.
    pub(crate) fn map<T: Send, R: Send>(&self, items: Vec<T>, work: impl Fn(T) -> R + Send + Sync) -> Vec<R> {
        match &self.pool {
            Some(pool) if items.len() > 1 => pool.install(|| items.into_par_iter().map(work).collect()),
            _ => items.into_iter().map(work).collect(),
        }
    }
}
