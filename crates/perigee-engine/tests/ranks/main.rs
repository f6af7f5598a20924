//! Tests of a replica's ranks with the CPU backend: ranks are threads with channels between them, and homes answer within
//! the process. One binary, so that its parts share their support; the attribute tells clippy that helpers are test code.

#[cfg(test)]
mod ahead;
#[cfg(test)]
mod costs;
mod filling;
#[cfg(test)]
mod goodbyes;
#[cfg(test)]
mod group;
#[cfg(test)]
mod misses;
#[cfg(test)]
mod moves;
#[cfg(test)]
mod network;
#[cfg(test)]
mod pages;
#[cfg(test)]
mod refusals;
#[cfg(test)]
mod remote;
