//! Tests of the epochs: every order of events within a budget of faults, random long ones beyond it, and the rules one by
//! one.

mod explore;
mod rules;
mod steps;
mod world;
