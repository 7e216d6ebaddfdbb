//! The bounds that a picture is fitted into.

/// The way in which a picture is fitted into a width and a height.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fit {
    /// As large as possible inside them.
    Contain,
    /// As small as possible to cover them; the rest is cut off, equally on both sides.
    Cover,
    /// Exactly their size, even if that distorts the picture.
    Fill,
}

/// The bounds that a picture is fitted into. Without a width or a height the other one decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// Width in pixels.
    pub width: Option<u32>,
    /// Height in pixels.
    pub height: Option<u32>,
    /// Meaningful if there are both.
    pub fit: Fit,
    /// Allows a picture to become larger, and thereby blurred.
    pub enlarge: bool,
}
