//! Score jobs over ranks that are threads: golden cases in every splitting, planted faults that the golden check must
//! notice, and odd shapes whose splittings must agree. Processes, sockets and the command line are tested beside the binary.

mod faults;
mod golden;
mod shapes;
