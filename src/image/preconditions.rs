//! The preconditions of a request, and their evaluation (RFC 9110 §13).

use std::time::SystemTime;

use hyper::header::HeaderValue;

use crate::image::{Metadata, Version};

/// The preconditions of a request. A field that is absent or must be ignored is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(clippy::struct_field_names, reason = "they are the names of the fields")]
pub struct Preconditions {
    /// `If-Match` (§13.1.1).
    pub if_match: Option<EntityTags>,
    /// `If-None-Match` (§13.1.2).
    pub if_none_match: Option<EntityTags>,
    /// `If-Modified-Since` (§13.1.3).
    pub if_modified_since: Option<SystemTime>,
    /// `If-Unmodified-Since` (§13.1.4).
    pub if_unmodified_since: Option<SystemTime>,
}

/// The outcome of evaluating the preconditions of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The request is answered as if it had none.
    Proceed,
    /// The client has the representation already: 304.
    NotModified,
    /// The client doesn't want this representation: 412.
    Failed,
}

impl Preconditions {
    /// Evaluates them against the representation that would be sent, in the order of §13.2.2.
    ///
    /// Dates are ignored for an image without one, whose record has no `created_at`.
    #[must_use]
    pub fn evaluate(&self, metadata: &Metadata) -> Verdict {
        let unmodified = match (&self.if_match, self.if_unmodified_since, metadata.last_modified) {
            (Some(tags), _, _) => tags.match_strongly(&metadata.etag),
            (None, Some(since), Some(modified)) => modified <= since,
            (None, _, _) => true,
        };
        if !unmodified {
            return Verdict::Failed;
        }
        let modified = match (&self.if_none_match, self.if_modified_since, metadata.last_modified) {
            (Some(tags), _, _) => !tags.match_weakly(&metadata.etag),
            (None, Some(since), Some(modified)) => modified > since,
            (None, _, _) => true,
        };
        if modified { Verdict::Proceed } else { Verdict::NotModified }
    }
}

/// The entity-tags in a precondition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntityTags {
    /// `*`: any representation at all.
    Any,
    /// These.
    List(Vec<EntityTag>),
}

/// An entity-tag in a precondition (§8.8.3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntityTag {
    /// True for a weak tag, which begins with `W/`.
    pub weak: bool,
    /// The tag without `W/`, with its quotes.
    pub opaque: Box<str>,
}

impl EntityTags {
    /// Compares them weakly with a strong tag (§8.8.3.2).
    #[must_use]
    pub fn match_weakly(&self, etag: &HeaderValue) -> bool {
        self.any(|tag| tag.opaque.as_bytes() == etag.as_bytes())
    }

    /// Compares them strongly with a strong tag (§8.8.3.2).
    #[must_use]
    pub fn match_strongly(&self, etag: &HeaderValue) -> bool {
        self.any(|tag| tag.is(etag))
    }

    /// Tells whether a strong one names a version, by any representation: writes depend on the version alone.
    #[must_use]
    pub fn name_strongly(&self, version: Version) -> bool {
        self.any(|tag| !tag.weak && version.is_named(&tag.opaque))
    }

    /// Tells whether one names a version, by any representation, weak or strong.
    #[must_use]
    pub fn name_weakly(&self, version: Version) -> bool {
        self.any(|tag| version.is_named(&tag.opaque))
    }

    fn any(&self, matches: impl Fn(&EntityTag) -> bool) -> bool {
        match self {
            EntityTags::Any => true,
            EntityTags::List(tags) => tags.iter().any(matches),
        }
    }
}

impl EntityTag {
    /// Compares it strongly with a strong tag (§8.8.3.2).
    #[must_use]
    pub fn is(&self, etag: &HeaderValue) -> bool {
        !self.weak && self.opaque.as_bytes() == etag.as_bytes()
    }
}
