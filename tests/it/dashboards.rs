//! What operators' tools make of the metrics.
