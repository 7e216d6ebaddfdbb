//! The items of an AVIF file: their places, properties and references (ISO/IEC 23008-12 §6, §9).

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::super::super::PictureError;
use super::boxes::{Boxes, Part, Reader, expect, find};
use super::{broken, unsupported};

/// Most entries of a table. Real files have some tens; a grid has an item for each cell.
const MOST: usize = 1 << 16;

/// The items of a file.
pub(super) struct Meta<'a> {
    file: &'a [u8],
    data: &'a [u8],
    pub(super) primary: u32,
    items: BTreeMap<u32, Item<'a>>,
    properties: Vec<Part<'a>>,
    references: Vec<Reference>,
}

#[derive(Default)]
struct Item<'a> {
    kind: [u8; 4],
    /// Numbers of the properties, counted from one, and true for those that a reader must know.
    properties: Vec<(u16, bool)>,
    place: Option<Place<'a>>,
}

/// The place of an item's data.
struct Place<'a> {
    /// Number of the method: in the file, or in the box of data.
    method: u16,
    /// Bytes of the fields: offset, length, base and index.
    sizes: [usize; 4],
    base: u64,
    count: u16,
    extents: &'a [u8],
}

/// An item that refers to another one.
pub(super) struct Reference {
    pub(super) kind: [u8; 4],
    pub(super) from: u32,
    pub(super) to: u32,
}

impl<'a> Meta<'a> {
    /// Reads the box `meta` of a file.
    pub(super) fn read(file: &'a [u8], meta: &'a [u8]) -> Result<Meta<'a>, PictureError> {
        let mut reader = Reader(meta);
        reader.version()?;
        let meta = reader.0;
        let mut read = Meta {
            file,
            data: find(meta, *b"idat")?.unwrap_or_default(),
            primary: primary(expect(meta, *b"pitm")?)?,
            items: BTreeMap::new(),
            properties: Vec::new(),
            references: Vec::new(),
        };
        read.read_kinds(expect(meta, *b"iinf")?)?;
        read.read_places(expect(meta, *b"iloc")?)?;
        if let Some(references) = find(meta, *b"iref")? {
            read.read_references(references)?;
        }
        let properties = expect(meta, *b"iprp")?;
        for property in Boxes(expect(properties, *b"ipco")?) {
            check_count(read.properties.len())?;
            read.properties.push(property?);
        }
        for part in Boxes(properties) {
            let part = part?;
            if part.kind == *b"ipma" {
                read.read_associations(part.payload)?;
            }
        }
        Ok(read)
    }

    fn read_kinds(&mut self, payload: &'a [u8]) -> Result<(), PictureError> {
        let mut reader = Reader(payload);
        let (version, _) = reader.version()?;
        reader.take(if version == 0 { 2 } else { 4 })?;
        for part in Boxes(reader.0) {
            let part = part?;
            let mut reader = Reader(part.payload);
            let (version, _) = reader.version()?;
            if part.kind != *b"infe" || version < 2 {
                continue;
            }
            let id = reader.number(if version == 2 { 2 } else { 4 })?;
            let protection = reader.u16()?;
            check_count(self.items.len())?;
            // A protected item can't be read.
            let kind = if protection == 0 { reader.kind()? } else { *b"\0\0\0\0" };
            self.item(id).kind = kind;
        }
        Ok(())
    }

    /// The item with a number. The caller counts new ones.
    #[expect(clippy::cast_possible_truncation, reason = "numbers have four bytes at most")]
    fn item(&mut self, id: u64) -> &mut Item<'a> {
        self.items.entry(id as u32).or_default()
    }

    fn read_places(&mut self, payload: &'a [u8]) -> Result<(), PictureError> {
        let mut reader = Reader(payload);
        let (version, _) = reader.version()?;
        let (first, second) = (usize::from(reader.u8()?), usize::from(reader.u8()?));
        let index = if version == 0 { 0 } else { second & 15 };
        let sizes = [first >> 4, first & 15, second >> 4, index];
        if version > 2 || sizes.iter().any(|it| !matches!(it, 0 | 4 | 8)) {
            return Err(broken("its box iloc has an unknown version or size"));
        }
        let numbers = if version < 2 { 2 } else { 4 };
        let count = reader.number(numbers)?;
        for _ in 0..count {
            let id = reader.number(numbers)?;
            let method = if version == 0 { 0 } else { reader.u16()? & 15 };
            let other_file = reader.u16()? != 0;
            let base = reader.number(sizes[2])?;
            let count = reader.u16()?;
            let extents = reader.take(usize::from(count) * (sizes[0] + sizes[1] + index))?;
            check_count(self.items.len())?;
            // Data in another file is as good as none.
            let method = if other_file { u16::MAX } else { method };
            let place = Place { method, sizes, base, count, extents };
            if self.item(id).place.replace(place).is_some() {
                return Err(broken("an item has two places"));
            }
        }
        Ok(())
    }

    fn read_references(&mut self, payload: &'a [u8]) -> Result<(), PictureError> {
        let mut reader = Reader(payload);
        let (version, _) = reader.version()?;
        let numbers = if version == 0 { 2 } else { 4 };
        for part in Boxes(reader.0) {
            let Part { kind, payload } = part?;
            let mut reader = Reader(payload);
            let from = id(reader.number(numbers)?);
            for _ in 0..reader.u16()? {
                check_count(self.references.len())?;
                let to = id(reader.number(numbers)?);
                self.references.push(Reference { kind, from, to });
            }
        }
        Ok(())
    }

    fn read_associations(&mut self, payload: &'a [u8]) -> Result<(), PictureError> {
        let mut reader = Reader(payload);
        let (version, flags) = reader.version()?;
        let (numbers, wide) = (if version == 0 { 2 } else { 4 }, flags & 1 != 0);
        let count = reader.u32()?;
        for _ in 0..count {
            let id = reader.number(numbers)?;
            check_count(self.items.len())?;
            let count = reader.u8()?;
            let mut properties = Vec::with_capacity(count.into());
            for _ in 0..count {
                let number = if wide {
                    reader.u16()?
                } else {
                    let byte = u16::from(reader.u8()?);
                    (byte & 0x80) << 8 | byte & 0x7f
                };
                // Zero stands for none.
                if number & 0x7fff != 0 {
                    properties.push((number & 0x7fff, number & 0x8000 != 0));
                }
            }
            let before = std::mem::replace(&mut self.item(id).properties, properties);
            if !before.is_empty() {
                return Err(broken("an item has two lists of properties"));
            }
        }
        Ok(())
    }

    /// The kind of an item. `None` if there is no such item.
    pub(super) fn kind(&self, item: u32) -> Option<[u8; 4]> {
        self.items.get(&item).map(|item| item.kind)
    }

    /// True if the file has items that are no pictures: EXIF, XMP and the like.
    pub(super) fn has_metadata(&self) -> bool {
        const PICTURES: [&[u8; 4]; 5] = [b"av01", b"grid", b"iovl", b"iden", b"tmap"];
        self.items.values().any(|item| !PICTURES.contains(&&item.kind))
    }

    /// The properties of an item in their order. Fails at one that isn't known, but must be.
    pub(super) fn properties(&self, item: u32) -> Result<Vec<Part<'a>>, PictureError> {
        const KNOWN: [&[u8; 4]; 14] = [
            b"ispe", b"pixi", b"colr", b"auxC", b"clap", b"irot", b"imir", b"av1C", b"a1op",
            b"lsel", b"a1lx", b"pasp", b"clli", b"mdcv",
        ];
        let mut properties = Vec::new();
        for (number, is_essential) in self.items.get(&item).map_or(&[][..], |it| &it.properties) {
            let property = self.properties.get(usize::from(*number) - 1);
            let property = property.ok_or_else(|| broken("a property of an item is missing"))?;
            if *is_essential && !KNOWN.contains(&&property.kind) {
                let kind = property.kind.escape_ascii();
                return Err(unsupported(&format!("AVIF with the property {kind}")));
            }
            properties.push(*property);
        }
        Ok(properties)
    }

    /// The items to which an item refers in a way, in their order.
    pub(super) fn targets(&self, kind: [u8; 4], from: u32) -> impl Iterator<Item = u32> {
        let all = self.references.iter();
        all.filter(move |it| it.kind == kind && it.from == from).map(|it| it.to)
    }

    /// The items that refer to an item in a way, in their order.
    pub(super) fn sources(&self, kind: [u8; 4], to: u32) -> impl Iterator<Item = u32> {
        let all = self.references.iter();
        all.filter(move |it| it.kind == kind && it.to == to).map(|it| it.from)
    }

    /// All references.
    pub(super) fn references(&self) -> &[Reference] {
        &self.references
    }

    /// The data of an item.
    pub(super) fn data(&self, item: u32) -> Result<Cow<'a, [u8]>, PictureError> {
        let missing = || broken("the data of an item is missing");
        let place = self.items.get(&item).and_then(|item| item.place.as_ref());
        let place = place.ok_or_else(missing)?;
        let source = match place.method {
            0 => self.file,
            1 => self.data,
            _ => return Err(unsupported("AVIF with data of another file or item")),
        };
        let [offset, length, _, index] = place.sizes;
        let mut reader = Reader(place.extents);
        let mut next = || {
            reader.number(index)?;
            let start = place.base.checked_add(reader.number(offset)?).ok_or_else(missing)?;
            let start = usize::try_from(start).map_err(|_far| missing())?;
            let length = usize::try_from(reader.number(length)?).map_err(|_long| missing())?;
            let rest = source.get(start..).ok_or_else(missing)?;
            // Without a length it is all of the rest.
            let length = if length == 0 { rest.len() } else { length };
            rest.get(..length).ok_or_else(missing)
        };
        if place.count == 1 {
            return next().map(Cow::Borrowed);
        }
        let mut whole = Vec::new();
        for _ in 0..place.count {
            let extent = next()?;
            // Extents that overlap would make much of little.
            if whole.len() + extent.len() > self.file.len() {
                return Err(broken("an item is larger than its file"));
            }
            whole.extend_from_slice(extent);
        }
        Ok(Cow::Owned(whole))
    }
}

fn primary(payload: &[u8]) -> Result<u32, PictureError> {
    let mut reader = Reader(payload);
    let (version, _) = reader.version()?;
    Ok(id(reader.number(if version == 0 { 2 } else { 4 })?))
}

#[expect(clippy::cast_possible_truncation, reason = "numbers have four bytes at most")]
fn id(number: u64) -> u32 {
    number as u32
}

fn check_count(count: usize) -> Result<(), PictureError> {
    if count >= MOST {
        return Err(unsupported("AVIF with very many items"));
    }
    Ok(())
}
