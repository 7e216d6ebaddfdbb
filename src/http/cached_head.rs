//! Cached response heads. The router's first answer to a hit is kept with the metadata of its image and replayed;
//! `Date` and `X-Request-Id` are added per request.
//!
//! A head is replayed only to requests with the same [`HeadKey`], which has everything that the answer depends on. Heads
//! hang off the metadata in the index, so they leave with their version.

use std::collections::VecDeque;
use std::io::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use axum::http::header::{CONNECTION, DATE, HeaderName};
use axum::http::{HeaderMap, HeaderValue, StatusCode};

use super::request_id::REQUEST_ID;
use crate::image::{Metadata, RepresentationKind};

/// Most heads of an image under other addresses than its plain one and the one with its version.
const MAX_OTHERS: usize = 8;

/// Most heads of all images.
const MAX_HEADS: usize = 16 * 1024;

/// Most bytes of all heads, in sixteenths of `[cache] bytes`: under 16 MiB by default.
const SIXTEENTHS: usize = 5;

/// The parts of a request for an image that the head of a hit depends on, beside its method and validator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HeadKey<'a> {
    /// The rest of the target behind the id: `?v=…`, `.webp?w=64`, `/thumbnail`.
    pub(crate) address: &'a str,
    /// The raw `Accept` field, where the format is negotiated.
    pub(crate) accept: Option<&'a [u8]>,
    /// The raw `Accept-Encoding` field, where the image has coded representations.
    pub(crate) accept_encoding: Option<&'a [u8]>,
}

/// The answers that have heads of their own under one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadStatus {
    /// 200, to GET and HEAD.
    Whole,
    /// 304 to GET.
    NotModified,
    /// 304 to HEAD, which has the length of the 200.
    NotModifiedToHead,
}

impl HeadStatus {
    /// Returns the kind of an answer, if its head can be cached.
    pub(crate) fn of(status: StatusCode, to_head: bool) -> Option<HeadStatus> {
        match (status, to_head) {
            (StatusCode::OK, _) => Some(HeadStatus::Whole),
            (StatusCode::NOT_MODIFIED, false) => Some(HeadStatus::NotModified),
            (StatusCode::NOT_MODIFIED, true) => Some(HeadStatus::NotModifiedToHead),
            _ => None,
        }
    }
}

/// The validator of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Validator<'a> {
    /// No `If-None-Match`.
    None,
    /// One entity-tag in its quotes, without its `W/` (RFC 9110 §13.1.2: weak comparison).
    Tag(&'a [u8]),
}

/// A cached response head.
#[derive(Debug)]
pub(crate) struct CachedHead {
    address: Box<str>,
    accept: Option<Box<[u8]>>,
    accept_encoding: Option<Box<[u8]>>,
    /// Set under the plain address and the one with the version, if it depends on nothing else.
    is_primary: bool,
    status: HeadStatus,
    /// The representation whose bytes follow a 200.
    pub(crate) kind: RepresentationKind,
    etag: HeaderValue,
    /// With an empty `X-Request-Id` in its place.
    fields: HeaderMap,
    /// As HTTP/1.1 sends it, without the empty line.
    http_1: OnceLock<Box<[u8]>>,
    /// The count of the bytes of all heads, once this one is a part of it.
    counted_by: Option<Arc<AtomicUsize>>,
}

impl Drop for CachedHead {
    fn drop(&mut self) {
        if let Some(bytes) = &self.counted_by {
            bytes.fetch_sub(self.size(), Ordering::Relaxed);
        }
    }
}

impl CachedHead {
    /// Returns the bytes that it takes, the text for HTTP/1.1 included, which is made later.
    fn size(&self) -> usize {
        /// A place of a header map: a name, a value, their hash and links, and the index of the place.
        const PLACE: usize = size_of::<HeaderName>() + size_of::<HeaderValue>() + 48;
        /// Memory of a value that isn't static, beside its bytes.
        const VALUE: usize = 48;
        let key = self.address.len()
            + self.accept.as_deref().map_or(0, <[u8]>::len)
            + self.accept_encoding.as_deref().map_or(0, <[u8]>::len);
        let values: usize = self.fields.values().map(|value| value.len() + VALUE).sum();
        let text: usize =
            self.fields.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
        size_of::<CachedHead>() + key + self.fields.capacity() * PLACE + values + text
    }

    /// Makes one of the router's answer.
    pub(crate) fn new(
        key: HeadKey<'_>,
        is_primary: bool,
        status: HeadStatus,
        representation: &Metadata,
        headers: &HeaderMap,
    ) -> CachedHead {
        // Room for the fields that are added to a clone.
        let mut fields = HeaderMap::with_capacity(headers.len() + 4);
        for (name, value) in headers {
            if name != DATE && name != CONNECTION && name != REQUEST_ID {
                fields.append(name.clone(), value.clone());
            }
        }
        fields.insert(REQUEST_ID, HeaderValue::from_static(""));
        CachedHead {
            address: key.address.into(),
            accept: key.accept.map(Into::into),
            accept_encoding: key.accept_encoding.map(Into::into),
            is_primary,
            status,
            kind: representation.kind,
            etag: representation.etag.clone(),
            fields,
            http_1: OnceLock::new(),
            counted_by: None,
        }
    }

    pub(crate) fn status(&self) -> StatusCode {
        match self.status {
            HeadStatus::Whole => StatusCode::OK,
            HeadStatus::NotModified | HeadStatus::NotModifiedToHead => StatusCode::NOT_MODIFIED,
        }
    }

    /// Returns a field that all replays have.
    pub(crate) fn field(&self, name: &HeaderName) -> Option<&HeaderValue> {
        self.fields.get(name)
    }

    /// Returns the fields for one request.
    pub(crate) fn fields(&self, request_id: HeaderValue) -> HeaderMap {
        let mut fields = self.fields.clone();
        fields.insert(REQUEST_ID, request_id);
        fields
    }

    /// Returns the head as HTTP/1.1 sends it, without `Date`, `X-Request-Id` and the empty line.
    pub(crate) fn http_1(&self) -> &[u8] {
        self.http_1.get_or_init(|| {
            let mut fields = self.fields.clone();
            fields.remove(REQUEST_ID);
            head_text(self.status(), &fields).into_boxed_slice()
        })
    }

    fn has_key(&self, key: &HeadKey<'_>) -> bool {
        *self.address == *key.address
            && self.accept.as_deref() == key.accept
            && self.accept_encoding.as_deref() == key.accept_encoding
    }

    /// Returns whether it answers a request with this validator.
    fn answers(&self, validator: Validator<'_>, to_head: bool) -> bool {
        let matches = matches!(validator, Validator::Tag(tag) if tag == self.etag.as_bytes());
        match self.status {
            HeadStatus::Whole => !matches,
            HeadStatus::NotModified => matches && !to_head,
            HeadStatus::NotModifiedToHead => matches && to_head,
        }
    }
}

/// The cached heads of one version of an image.
#[derive(Debug, Default)]
pub(crate) struct CachedHeads(Mutex<Vec<Arc<CachedHead>>>);

impl CachedHeads {
    /// Returns the head that answers a request.
    pub(crate) fn find(
        &self,
        key: &HeadKey<'_>,
        validator: Validator<'_>,
        to_head: bool,
    ) -> Option<Arc<CachedHead>> {
        let heads = self.lock();
        let mut heads = heads.iter();
        heads.find(|it| it.answers(validator, to_head) && it.has_key(key)).map(Arc::clone)
    }

    /// Keeps a head, in the place of the oldest other one if there are too many. Returns it if it is new.
    fn keep(&self, head: CachedHead) -> Option<Weak<CachedHead>> {
        let key = HeadKey {
            address: &head.address,
            accept: head.accept.as_deref(),
            accept_encoding: head.accept_encoding.as_deref(),
        };
        let mut heads = self.lock();
        if heads.iter().any(|it| it.status == head.status && it.has_key(&key)) {
            return None;
        }
        let others = heads.iter().filter(|it| !it.is_primary).count();
        if !head.is_primary
            && others >= MAX_OTHERS
            && let Some(oldest) = heads.iter().position(|it| !it.is_primary)
        {
            heads.remove(oldest);
        }
        let head = Arc::new(head);
        let kept = Arc::downgrade(&head);
        heads.push(head);
        Some(kept)
    }

    fn remove(&self, head: &Arc<CachedHead>) {
        self.lock().retain(|it| !Arc::ptr_eq(it, head));
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<CachedHead>>> {
        // Nothing under the lock can panic half-way, so a poisoned one is sound.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The order in which heads were cached, to bound their number and their bytes.
#[derive(Debug)]
pub(crate) struct HeadOrder {
    order: Mutex<VecDeque<(Weak<Metadata>, Weak<CachedHead>)>>,
    bytes: Arc<AtomicUsize>,
    max_bytes: usize,
}

impl HeadOrder {
    /// An empty order for a cache of some bytes.
    pub(crate) fn new(cache_bytes: usize) -> HeadOrder {
        let max_bytes = cache_bytes / 16 * SIXTEENTHS;
        HeadOrder { order: Mutex::default(), bytes: Arc::default(), max_bytes }
    }

    /// Keeps a head with the metadata of its image, and drops those that were cached first if there are too many. They are
    /// cached again at their next hit.
    pub(crate) fn keep(&self, original: &Arc<Metadata>, mut head: CachedHead) {
        self.bytes.fetch_add(head.size(), Ordering::Relaxed);
        head.counted_by = Some(Arc::clone(&self.bytes));
        let Some(kept) = original.attachment.get_or_default::<CachedHeads>().keep(head) else {
            return;
        };
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        order.push_back((Arc::downgrade(original), kept));
        while order.len() > MAX_HEADS || self.bytes.load(Ordering::Relaxed) > self.max_bytes {
            let Some((original, head)) = order.pop_front() else { break };
            let (original, head) = (original.upgrade(), head.upgrade());
            let heads = original.as_ref().and_then(|it| it.attachment.get::<CachedHeads>());
            if let (Some(heads), Some(head)) = (heads, head) {
                heads.remove(&head);
            }
        }
    }
}

/// Formats a head as HTTP/1.1 sends it, without `Date` and the empty line.
pub(crate) fn head_text(status: StatusCode, headers: &HeaderMap) -> Vec<u8> {
    let mut text = Vec::with_capacity(1024);
    let reason = status.canonical_reason().unwrap_or_default();
    let _ = write!(text, "HTTP/1.1 {} {reason}\r\n", status.as_u16());
    for (name, value) in headers {
        if name != DATE {
            field(&mut text, name, value.as_bytes());
        }
    }
    text
}

/// Writes a field.
pub(crate) fn field(head: &mut Vec<u8>, name: &HeaderName, value: &[u8]) {
    head.extend_from_slice(name.as_str().as_bytes());
    head.extend_from_slice(b": ");
    head.extend_from_slice(value);
    head.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{MediaType, Version};

    fn metadata(text: &str) -> Arc<Metadata> {
        Arc::new(Metadata::new(Version::of(text.as_bytes()), MediaType::Png, 1, None))
    }

    fn key(address: &str) -> HeadKey<'_> {
        HeadKey { address, accept: None, accept_encoding: None }
    }

    fn head(metadata: &Metadata, key: HeadKey<'_>, status: HeadStatus) -> CachedHead {
        CachedHead::new(key, key == self::key(""), status, metadata, &HeaderMap::new())
    }

    #[test]
    fn a_head_is_found_under_its_key_its_method_and_its_validator_only() {
        let metadata = metadata("a");
        let heads = CachedHeads::default();
        let (json, brotli) = (Some(&b"image/webp"[..]), Some(&b"br"[..]));
        let keys = [
            key(""),
            key("?w=64"),
            HeadKey { accept: json, ..key("?w=64") },
            HeadKey { accept_encoding: brotli, ..key("") },
        ];
        let tag = Validator::Tag(metadata.etag.as_bytes());
        for key in keys {
            assert!(heads.find(&key, Validator::None, false).is_none());
            assert!(heads.keep(head(&metadata, key, HeadStatus::Whole)).is_some());
            assert!(heads.keep(head(&metadata, key, HeadStatus::Whole)).is_none());
            for validator in [Validator::None, Validator::Tag(b"\"x\"")] {
                let found = heads.find(&key, validator, false).unwrap();
                assert!(found.has_key(&key) && found.status() == StatusCode::OK);
                assert!(heads.find(&key, validator, true).is_some());
            }
            assert!(heads.find(&key, tag, false).is_none());
            assert!(heads.keep(head(&metadata, key, HeadStatus::NotModified)).is_some());
            assert!(
                heads.find(&key, tag, false).is_some() && heads.find(&key, tag, true).is_none()
            );
        }
    }

    #[test]
    fn an_image_has_no_more_heads_than_it_may_and_keeps_those_of_its_own_address() {
        let metadata = metadata("a");
        let heads = CachedHeads::default();
        heads.keep(head(&metadata, key(""), HeadStatus::Whole));
        for number in 0..100 {
            let address = format!("?w={number}");
            heads.keep(head(&metadata, key(&address), HeadStatus::Whole));
            assert!(heads.find(&key(&address), Validator::None, false).is_some());
        }
        assert_eq!(heads.lock().len(), 1 + MAX_OTHERS);
        assert!(heads.find(&key(""), Validator::None, false).is_some());
    }

    #[test]
    fn there_are_no_more_heads_of_all_images_than_there_may_be() {
        let order = HeadOrder::new(1 << 30);
        let images: Vec<_> = (0..MAX_HEADS + 10).map(|it| metadata(&it.to_string())).collect();
        for image in &images {
            order.keep(image, head(image, key(""), HeadStatus::Whole));
        }
        let has = |image: &Arc<Metadata>| {
            let heads = image.attachment.get::<CachedHeads>().unwrap();
            heads.find(&key(""), Validator::None, false).is_some()
        };
        assert_eq!(images.iter().filter(|it| has(it)).count(), MAX_HEADS);
        assert!(!has(&images[9]) && has(&images[10]));
    }

    #[test]
    fn heads_take_no_more_bytes_than_they_may_and_give_them_back() {
        let order = HeadOrder::new(1 << 20);
        let mut images: Vec<_> = (0..2000).map(|it| metadata(&it.to_string())).collect();
        for image in &images {
            order.keep(image, head(image, key(""), HeadStatus::Whole));
            // The same once more is dropped.
            order.keep(image, head(image, key(""), HeadStatus::Whole));
            assert!(order.bytes.load(Ordering::Relaxed) <= order.max_bytes);
        }
        let heads =
            |image: &Arc<Metadata>| image.attachment.get::<CachedHeads>().unwrap().lock().len();
        assert_eq!(heads(&images[0]), 0);
        assert_eq!(heads(&images[1999]), 1);
        let kept: usize = images.iter().map(heads).sum();
        assert!(kept > 100, "{kept}");
        // They leave with their images.
        images.clear();
        assert_eq!(order.bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_replayed_head_has_the_id_of_its_request_once() {
        let metadata = metadata("a");
        let mut headers = HeaderMap::new();
        headers.insert("etag", metadata.etag.clone());
        headers.insert(REQUEST_ID, HeaderValue::from_static("first"));
        let head = CachedHead::new(key(""), true, HeadStatus::Whole, &metadata, &headers);
        let fields = head.fields(HeaderValue::from_static("second"));
        assert_eq!(fields.get_all(REQUEST_ID).iter().collect::<Vec<_>>(), ["second"]);
        let text = String::from_utf8(head.http_1().to_vec()).unwrap();
        let etag = metadata.etag.to_str().unwrap();
        assert_eq!(text, format!("HTTP/1.1 200 OK\r\netag: {etag}\r\n"));
    }
}
