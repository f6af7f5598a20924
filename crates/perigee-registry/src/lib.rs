//! Who is in the cluster: records, and a stream of changes, behind one trait.
