//! Tests of the scheduler: single rules on small cases, and properties over random workloads with a model of execution
//! that checks every plan.

mod arrivals;
mod device;
mod following;
mod harness;
mod moves;
mod moving;
mod properties;
mod rules;
