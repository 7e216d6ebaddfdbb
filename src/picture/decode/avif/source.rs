//! The picture that a file shows: its primary item, or the first frame of its track.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use image::metadata::Orientation;

use super::super::super::PictureError;
use super::boxes::{Boxes, Part, Reader, expect, find};
use super::meta::Meta;
use super::{broken, unsupported};

/// A picture in its parts. No data of the pixels is read.
pub(super) struct Source<'a> {
    pub(super) colour: Layer<'a>,
    pub(super) alpha: Option<Layer<'a>>,
    /// True if the colours are multiplied by alpha.
    pub(super) is_premultiplied: bool,
    /// Left, top, width and height of the part that is shown, not yet upright.
    pub(super) crop: [u32; 4],
    pub(super) orientation: Orientation,
    pub(super) profile: Option<&'a [u8]>,
    pub(super) points: Option<Points>,
    meta: Option<Meta<'a>>,
}

/// Code points of colours (ITU-T H.273 §8).
#[derive(Debug, Clone, Copy)]
pub(super) struct Points {
    /// Primaries, curve and matrix.
    pub(super) points: [u16; 3],
    pub(super) is_full_range: bool,
}

/// A picture of cells of one size; most have one.
pub(super) struct Layer<'a> {
    pub(super) size: (u32, u32),
    pub(super) columns: u32,
    pub(super) cells: Vec<Cell<'a>>,
}

/// A coded image.
#[derive(Clone, Copy)]
pub(super) struct Cell<'a> {
    place: Place<'a>,
    pub(super) size: (u32, u32),
    /// The operating point that is decoded.
    pub(super) point: u8,
    /// The layer that is shown, if not the last one.
    pub(super) layer: Option<u16>,
}

#[derive(Clone, Copy)]
enum Place<'a> {
    Item(u32),
    Sample(&'a [u8]),
}

impl<'a> Source<'a> {
    pub(super) fn read(bytes: &'a [u8]) -> Result<Source<'a>, PictureError> {
        match moving(bytes)? {
            Some(moov) => Source::of_track(bytes, moov),
            None => Source::of_item(meta(bytes)?),
        }
    }

    fn of_item(meta: Meta<'a>) -> Result<Source<'a>, PictureError> {
        let colour = layer(&meta, meta.primary)?;
        let alpha = alpha_of(&meta, meta.primary)?;
        let is_premultiplied =
            alpha.is_some_and(|alpha| meta.targets(*b"prem", meta.primary).any(|it| it == alpha));
        let of_cells = alpha_of_cells(&meta, &colour)?;
        if alpha.is_some() && of_cells.is_some() {
            return Err(unsupported("AVIF with alpha of a grid and of its cells"));
        }
        let alpha = alpha.map(|alpha| layer(&meta, alpha)).transpose()?.or(of_cells);
        let properties = meta.properties(meta.primary)?;
        let (crop, orientation) = transforms(&properties, colour.size)?;
        let (profile, points) = colours(&properties)?;
        let meta = Some(meta);
        Source { colour, alpha, is_premultiplied, crop, orientation, profile, points, meta }
            .checked()
    }

    fn of_track(bytes: &'a [u8], moov: &'a [u8]) -> Result<Source<'a>, PictureError> {
        let mut tracks = Vec::new();
        for part in Boxes(moov) {
            let part = part?;
            if part.kind == *b"trak" && tracks.len() < 16 {
                tracks.extend(Track::read(bytes, part.payload)?);
            }
        }
        let missing = || broken("it has no track of pictures");
        let colour = tracks.iter().find(|it| it.shown_with == 0).ok_or_else(missing)?;
        let alpha = tracks.iter().find(|it| it.shown_with == colour.id);
        let (profile, points) = colours(&colour.properties)?;
        let size = colour.cell.size;
        Source {
            colour: colour.layer(),
            alpha: alpha.map(Track::layer),
            is_premultiplied: alpha.is_some_and(|alpha| colour.multiplied_by == alpha.id),
            crop: [0, 0, size.0, size.1],
            orientation: Orientation::NoTransforms,
            profile,
            points,
            meta: None,
        }
        .checked()
    }

    fn checked(self) -> Result<Source<'a>, PictureError> {
        if self.alpha.as_ref().is_some_and(|alpha| alpha.size != self.colour.size) {
            return Err(unsupported("AVIF with alpha of another size"));
        }
        Ok(self)
    }

    /// The data of a cell.
    pub(super) fn data(&self, cell: &Cell<'a>) -> Result<Cow<'a, [u8]>, PictureError> {
        match (cell.place, &self.meta) {
            (Place::Sample(data), _) => Ok(Cow::Borrowed(data)),
            (Place::Item(item), Some(meta)) => meta.data(item),
            (Place::Item(_), None) => Err(broken("it has no items")),
        }
    }
}

/// The tracks of a file that is shown as a film: the major brand decides, as in libavif.
pub(super) fn moving(bytes: &[u8]) -> Result<Option<&[u8]>, PictureError> {
    if bytes.get(4..8) != Some(b"ftyp") {
        return Err(broken("it doesn't begin with its brands"));
    }
    match bytes.get(8..12) {
        Some(b"avis") => find(bytes, *b"moov"),
        _ => Ok(None),
    }
}

/// The items of a file.
pub(super) fn meta(bytes: &[u8]) -> Result<Meta<'_>, PictureError> {
    Meta::read(bytes, expect(bytes, *b"meta")?)
}

/// The alpha of an item.
fn alpha_of(meta: &Meta<'_>, item: u32) -> Result<Option<u32>, PictureError> {
    for auxiliary in meta.sources(*b"auxl", item) {
        if has_alpha(meta, auxiliary)? {
            return Ok(Some(auxiliary));
        }
    }
    Ok(None)
}

/// The alpha of a grid whose cells have each their own.
fn alpha_of_cells<'a>(
    meta: &Meta<'a>,
    colour: &Layer<'a>,
) -> Result<Option<Layer<'a>>, PictureError> {
    let cells: BTreeSet<u32> = meta.targets(*b"dimg", meta.primary).collect();
    // A file may have many cells and references: all are gone through once.
    let references = meta.references().iter().filter(|it| it.kind == *b"auxl");
    let items = references.filter(|it| cells.contains(&it.to)).map(|it| (it.to, it.from));
    let items: BTreeMap<u32, u32> = items.collect();
    if items.is_empty() {
        return Ok(None);
    }
    let refused = || unsupported("AVIF with alpha of some of its cells");
    if meta.references().iter().any(|it| it.kind == *b"prem" && cells.contains(&it.from)) {
        return Err(refused());
    }
    let mut alpha = Vec::new();
    for (item, of) in meta.targets(*b"dimg", meta.primary).zip(&colour.cells) {
        let found = *items.get(&item).ok_or_else(refused)?;
        let of_alpha = cell(meta, found, true)?;
        if !has_alpha(meta, found)? || of_alpha.size != of.size {
            return Err(refused());
        }
        alpha.push(of_alpha);
    }
    Ok(Some(Layer { size: colour.size, columns: colour.columns, cells: alpha }))
}

/// True if an auxiliary item is alpha.
fn has_alpha(meta: &Meta<'_>, item: u32) -> Result<bool, PictureError> {
    let mut properties = meta.properties(item)?.into_iter();
    Ok(properties.any(|it| it.kind == *b"auxC" && is_alpha(it.payload)))
}

fn is_alpha(payload: &[u8]) -> bool {
    const NAMES: [&[u8]; 2] =
        [b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0", b"urn:mpeg:hevc:2015:auxid:1\0"];
    payload.get(4..).is_some_and(|name| NAMES.iter().any(|it| name.starts_with(it)))
}

/// The cells of an item (ISO/IEC 23008-12 §6.6.2.3).
fn layer<'a>(meta: &Meta<'a>, item: u32) -> Result<Layer<'a>, PictureError> {
    match meta.kind(item) {
        Some(kind) if kind == *b"av01" => {
            let cell = cell(meta, item, false)?;
            return Ok(Layer { size: cell.size, columns: 1, cells: vec![cell] });
        }
        Some(kind) if kind == *b"grid" => {}
        Some(kind) => {
            let kind = kind.escape_ascii();
            return Err(unsupported(&format!("AVIF whose picture is of the kind {kind}")));
        }
        None => return Err(broken("its picture is missing")),
    }
    let data = meta.data(item)?;
    let mut reader = Reader(&data);
    let (_version, flags) = (reader.u8()?, reader.u8()?);
    let (rows, columns) = (u32::from(reader.u8()?) + 1, u32::from(reader.u8()?) + 1);
    let size = if flags & 1 == 0 {
        (reader.u16()?.into(), reader.u16()?.into())
    } else {
        (reader.u32()?, reader.u32()?)
    };
    let cells = meta.targets(*b"dimg", item).map(|it| cell(meta, it, true));
    let cells = cells.collect::<Result<Vec<_>, _>>()?;
    let one = cells.first().map_or((0, 0), |cell| cell.size);
    let fits = |cells: u32, one: u32, all: u32| {
        let (cells, one, all) = (u64::from(cells), u64::from(one), u64::from(all));
        cells * one >= all && (cells - 1) * one < all
    };
    let is_whole = fits(columns, one.0, size.0) && fits(rows, one.1, size.1);
    let are_like = cells.iter().all(|cell| cell.size == one);
    if cells.len() as u64 != u64::from(rows) * u64::from(columns) || !is_whole || !are_like {
        return Err(broken("its cells aren't as its grid says"));
    }
    Ok(Layer { size, columns, cells })
}

fn cell<'a>(meta: &Meta<'a>, item: u32, is_in_grid: bool) -> Result<Cell<'a>, PictureError> {
    if meta.kind(item) != Some(*b"av01") {
        return Err(unsupported("AVIF with a cell that isn't AV1"));
    }
    let (mut size, mut point, mut layer) = (None, 0, None);
    for Part { kind, payload } in meta.properties(item)? {
        let mut reader = Reader(payload);
        match &kind {
            b"ispe" => {
                reader.version()?;
                size = Some((reader.u32()?, reader.u32()?));
            }
            b"a1op" => point = reader.u8()?,
            // All ones stand for all layers.
            b"lsel" => layer = Some(reader.u16()?).filter(|it| *it != u16::MAX),
            b"clap" | b"irot" | b"imir" if is_in_grid => {
                return Err(unsupported("AVIF with cells that are turned"));
            }
            _ => {}
        }
    }
    let size = size.ok_or_else(|| broken("an item has no size"))?;
    if size.0 == 0 || size.1 == 0 || point > 31 {
        return Err(broken("an item has no pixels"));
    }
    Ok(Cell { place: Place::Item(item), size, point, layer })
}

/// The part that is shown, and how it is turned: cropped, rotated, mirrored, in this order (ISO/IEC 23000-22 §7.3.6.7).
fn transforms(
    properties: &[Part],
    size: (u32, u32),
) -> Result<([u32; 4], Orientation), PictureError> {
    let mut crop = [0, 0, size.0, size.1];
    let (mut turns, mut axis, mut step) = (0, None, 0);
    for Part { kind, payload } in properties {
        let mut reader = Reader(payload);
        let next = match kind {
            b"clap" => 1,
            b"irot" => 2,
            b"imir" => 3,
            _ => continue,
        };
        if next <= step {
            return Err(unsupported("AVIF that is turned in an unusual order"));
        }
        step = next;
        match kind {
            b"clap" => crop = aperture(reader, size)?,
            b"irot" => turns = reader.u8()? & 3,
            _ => axis = Some(reader.u8()? & 1),
        }
    }
    // Rotated against the clock; then top and bottom are exchanged, or left and right.
    let orientation = match (axis, turns) {
        (None, 0) => Orientation::NoTransforms,
        (None, 1) => Orientation::Rotate270,
        (None, 2) => Orientation::Rotate180,
        (None, 3..) => Orientation::Rotate90,
        (Some(0), 0) | (Some(1..), 2) => Orientation::FlipVertical,
        (Some(0), 2) | (Some(1..), 0) => Orientation::FlipHorizontal,
        (Some(0), 1) | (Some(1..), 3..) => Orientation::Rotate90FlipH,
        (Some(0), 3..) | (Some(1..), 1) => Orientation::Rotate270FlipH,
    };
    Ok((crop, orientation))
}

/// The rectangle of a clean aperture (ISO/IEC 14496-12 §12.1.4). It must lie within the picture, at whole pixels.
fn aperture(mut reader: Reader, size: (u32, u32)) -> Result<[u32; 4], PictureError> {
    let refused = || unsupported("AVIF whose clean aperture isn't a part of its pixels");
    let mut numbers = [0; 8];
    for number in &mut numbers {
        *number = reader.u32()?;
    }
    let [width, width_by, height, height_by, x, x_by, y, y_by] = numbers;
    let span = |length: u32, by: u32, offset: u32, offset_by: u32, whole: u32| {
        let length = length.checked_div(by).filter(|it| it * by == length && *it > 0)?;
        // From the centre of the picture to that of the part. Offsets may be negative.
        let twice = i64::from(offset.cast_signed()).checked_mul(2)?;
        let spare = i64::from(whole).checked_sub(length.into())?;
        let start = spare.checked_mul(offset_by.into())?.checked_add(twice)?;
        let by = i64::from(offset_by).checked_mul(2).filter(|by| *by > 0 && start % by == 0)?;
        let start = u32::try_from(start / by).ok()?;
        (start.checked_add(length)? <= whole).then_some((start, length))
    };
    let (left, width) = span(width, width_by, x, x_by, size.0).ok_or_else(refused)?;
    let (top, height) = span(height, height_by, y, y_by, size.1).ok_or_else(refused)?;
    // Chromium shows all of the picture then.
    if (left, top) != (0, 0) {
        return Err(unsupported("AVIF with a clean aperture that begins within the picture"));
    }
    Ok([left, top, width, height])
}

/// The profile and the code points among the properties. The first of each kind counts.
fn colours<'a>(
    properties: &[Part<'a>],
) -> Result<(Option<&'a [u8]>, Option<Points>), PictureError> {
    let (mut profile, mut points) = (None, None);
    for part in properties.iter().filter(|it| it.kind == *b"colr") {
        let mut reader = Reader(part.payload);
        match &reader.kind()? {
            b"prof" | b"rICC" => _ = profile.get_or_insert(reader.0),
            b"nclx" => {
                let numbers = [reader.u16()?, reader.u16()?, reader.u16()?];
                let is_full_range = reader.u8()? & 0x80 != 0;
                points.get_or_insert(Points { points: numbers, is_full_range });
            }
            _ => {}
        }
    }
    Ok((profile, points))
}

/// A track of AV1 pictures (ISO/IEC 14496-12 §8.3), by its first sample.
struct Track<'a> {
    id: u32,
    /// The track that it is the alpha of; zero for none.
    shown_with: u32,
    /// The track of alpha that its colours are multiplied by; zero for none.
    multiplied_by: u32,
    cell: Cell<'a>,
    properties: Vec<Part<'a>>,
}

impl<'a> Track<'a> {
    /// Reads a track. `None` for one of something else.
    fn read(bytes: &'a [u8], track: &'a [u8]) -> Result<Option<Track<'a>>, PictureError> {
        let mut reader = Reader(expect(track, *b"tkhd")?);
        let (version, _) = reader.version()?;
        reader.take(if version == 1 { 16 } else { 8 })?;
        let id = reader.u32()?;
        let table = expect(expect(expect(track, *b"mdia")?, *b"minf")?, *b"stbl")?;
        let mut entries = Reader(expect(table, *b"stsd")?);
        entries.take(8)?;
        let Some(entry) = Boxes(entries.0).next().transpose()? else { return Ok(None) };
        if entry.kind != *b"av01" {
            return Ok(None);
        }
        let mut reader = Reader(entry.payload);
        reader.take(24)?;
        let size = (reader.u16()?.into(), reader.u16()?.into());
        reader.take(50)?;
        let properties = Boxes(reader.0).collect::<Result<Vec<_>, _>>()?;
        let references = find(track, *b"tref")?.unwrap_or_default();
        let target = |kind| {
            let payload = find(references, kind)?;
            payload.map_or(Ok(0), |payload| Reader(payload).u32())
        };
        let auxiliary = properties.iter().find(|it| it.kind == *b"auxi");
        let shown_with = match auxiliary {
            Some(auxiliary) if is_alpha(auxiliary.payload) => target(*b"auxl")?,
            Some(_) => return Ok(None),
            None => 0,
        };
        let place = Place::Sample(first_sample(bytes, table)?);
        if size.0 == 0 || size.1 == 0 {
            return Err(broken("a track has no pixels"));
        }
        let cell = Cell { place, size, point: 0, layer: None };
        let multiplied_by = target(*b"prem")?;
        Ok(Some(Track { id, shown_with, multiplied_by, cell, properties }))
    }

    fn layer(&self) -> Layer<'a> {
        Layer { size: self.cell.size, columns: 1, cells: vec![self.cell] }
    }
}

/// The first sample: it begins the first chunk.
fn first_sample<'a>(bytes: &'a [u8], table: &'a [u8]) -> Result<&'a [u8], PictureError> {
    let mut sizes = Reader(expect(table, *b"stsz")?);
    sizes.take(4)?;
    let size = match (sizes.u32()?, sizes.u32()?) {
        (_, 0) => 0,
        (0, _) => sizes.u32()?,
        (all, _) => all,
    };
    let start = match find(table, *b"stco")? {
        Some(places) => Reader(places.get(8..).unwrap_or_default()).number(4)?,
        None => Reader(expect(table, *b"co64")?.get(8..).unwrap_or_default()).number(8)?,
    };
    let sample = usize::try_from(start).ok().and_then(|start| bytes.get(start..));
    let sample = sample.and_then(|rest| rest.get(..size as usize)).filter(|it| !it.is_empty());
    sample.ok_or_else(|| broken("its first frame is cut off"))
}
