//! Caches in front: nginx and Varnish.
