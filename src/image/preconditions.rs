//! What a client makes its request depend on (RFC 9110 §13), and whether it holds.

use std::time::SystemTime;

use hyper::header::HeaderValue;

use crate::image::{Metadata, Version};

/// The preconditions of a request. A field that isn't there, or that has to be ignored, is `None`.
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

/// What the preconditions make of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is answered as without them.
    Proceed,
    /// The client has the representation.
    NotModified,
    /// The client doesn't want this representation.
    Failed,
}

impl Preconditions {
    /// Evaluates them against the representation that would be sent, in the order of §13.2.2.
    ///
    /// A date is compared only where the image has one, which is where its record has `created_at`.
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

/// The entity-tags that a client named in a precondition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntityTags {
    /// `*`: any representation at all.
    Any,
    /// These.
    List(Vec<EntityTag>),
}

/// An entity-tag that a client named (§8.8.3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntityTag {
    /// Whether `W/` stood before it.
    pub weak: bool,
    /// What follows, in its quotes.
    pub opaque: Box<str>,
}

impl EntityTags {
    /// Whether one of them is the given strong tag, weak or not (§8.8.3.2).
    #[must_use]
    pub fn match_weakly(&self, etag: &HeaderValue) -> bool {
        self.any(|tag| tag.opaque.as_bytes() == etag.as_bytes())
    }

    /// Whether one of them is the given strong tag, and strong itself (§8.8.3.2).
    #[must_use]
    pub fn match_strongly(&self, etag: &HeaderValue) -> bool {
        self.any(|tag| tag.is(etag))
    }

    /// Whether one of them is strong and names a version, in whichever form: what a write depends on is the version.
    #[must_use]
    pub fn name_strongly(&self, version: Version) -> bool {
        self.any(|tag| !tag.weak && version.is_named(&tag.opaque))
    }

    /// Whether one of them names a version, in whichever form, weak or not.
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
    /// Whether it is the given strong tag, by strong comparison (§8.8.3.2).
    #[must_use]
    pub fn is(&self, etag: &HeaderValue) -> bool {
        !self.weak && self.opaque.as_bytes() == etag.as_bytes()
    }
}
