//! What testers that read the standards make of the service.
