//! The balancer over whole replicas: shipped router, scheduler, moves and services, on a clock that moves only when everybody
//! waits, over engines whose steps take modelled time. A run of minutes takes seconds and is the same on every machine.

mod arrivals;
mod fleet;
mod judge;
mod network;
mod timed;
