//! Traits of an original that decide about its representations. `picture` tells them from the bytes.

/// Traits of an original.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traits {
    /// True for an image with more than one frame.
    pub animated: bool,
    /// Metadata in the file: EXIF with its place and time, XMP, comments.
    pub embedded: Embedded,
}

/// Metadata that are embedded in a file. Only the plain address gives them away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Embedded {
    /// None, or none that are known: types that aren't decoded are served as they are.
    #[default]
    Nothing,
    /// They can be removed, and all pixels stay as they are.
    Removable,
    /// The picture must be encoded again, since they say how it is turned, or can't be removed.
    Inseparable,
}
