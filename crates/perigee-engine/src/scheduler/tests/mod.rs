//! Tests of the scheduler: single rules on small cases, and properties over random workloads with a model of execution
//! that checks every plan.

mod harness;
mod properties;
mod rules;
