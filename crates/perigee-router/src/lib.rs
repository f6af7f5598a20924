//! The front door: places sessions on replicas and owns the client's stream. It knows no tensor.
