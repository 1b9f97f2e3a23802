//! The tags of a range, one by one.

use std::io::Write;
use std::ops::Range;

use mte::{GRANULE_SIZE, Tag, TagPage};
use serde::Serialize;

use crate::error::{Error, Result, output};
use crate::view::{Gap, PAGE, Part, View};

const GRANULE: u64 = GRANULE_SIZE as u64;
/// Bytes of memory whose tags are a line of text: 64 granules.
const LINE: u64 = 64 * GRANULE;
/// Between these granules of a line there is a blank.
const GROUP: usize = 16;

/// How tags are dumped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// An address and 64 hexadecimal digits a line, a digit a granule; a line `*` for lines like the one before.
    Text,
    /// Packed tags and nothing else: two a byte, the lower address in the low nibble. Holes are tags 0.
    Binary,
    /// An array of spans of granules with the same tag.
    Json,
}

/// Dumps the tags of a view.
///
/// # Errors
/// [`Error::NoTags`]; [`Error::HalfByte`] and [`Error::NotInBinary`] for what cannot be in a binary dump; whatever keeps
/// the memory from being read or `to` from being written.
pub fn dump(view: &mut View<'_>, format: Format, to: &mut dyn Write) -> Result<()> {
    view.must_have_tags()?;
    let range = view.range();
    let mut dumper: Box<dyn Dumper + '_> = match format {
        Format::Text => Box::new(Text::new(to)),
        Format::Binary => Box::new(Binary::new(to, &range)?),
        Format::Json => Box::new(Json::new(to)),
    };
    view.visit_in_order(&mut |part| match part {
        Part::Pages { address, tags, .. } => {
            granules(address, tags, &range, &mut |address, tags| {
                dumper.tags(address, tags)
            })
        }
        Part::Gap(gap, kind) => {
            let gap = gap.start.max(range.start)..gap.end.min(range.end);
            dumper.gap(gap, kind)
        }
    })?;
    dumper.end()
}

/// Gives the tags of each page, one a byte, those within the range, with the address of the first.
pub(crate) fn granules(
    address: u64,
    tags: &[TagPage],
    range: &Range<u64>,
    each: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    for (tags, page) in tags.iter().zip(0..) {
        let page = address + page * PAGE;
        let behind = page.saturating_add(PAGE);
        let first = range.start.clamp(page, behind);
        let end = range.end.clamp(page, behind);
        let [from, to] = [first, end].map(|at| ((at - page) / GRANULE) as usize);
        if from < to {
            each(first, &tags.unpack()[from..to])?;
        }
    }
    Ok(())
}

/// Takes what is in the range, in order.
trait Dumper {
    /// The tags of granules from an address on, one a byte.
    fn tags(&mut self, address: u64, tags: &[u8]) -> Result<()>;
    fn gap(&mut self, range: Range<u64>, kind: Gap) -> Result<()>;
    fn end(&mut self) -> Result<()>;
}

/// A gap, joined with the next one if that is of the same kind.
#[derive(Default)]
struct Joined(Option<(Range<u64>, Gap)>);

impl Joined {
    /// The gap before, if this one does not go on with it.
    fn add(&mut self, range: Range<u64>, kind: Gap) -> Option<(Range<u64>, Gap)> {
        match &mut self.0 {
            Some((before, same)) if before.end == range.start && *same == kind => {
                before.end = range.end;
                None
            }
            _ => self.0.replace((range, kind)),
        }
    }
}

struct Text<'a> {
    to: &'a mut dyn Write,
    gap: Joined,
    /// Tags of the line before, if it was whole.
    before: Option<Vec<u8>>,
    repeated: bool,
}

impl<'a> Text<'a> {
    fn new(to: &'a mut dyn Write) -> Self {
        Self {
            to,
            gap: Joined::default(),
            before: None,
            repeated: false,
        }
    }

    fn line(&mut self, text: &str) -> Result<()> {
        writeln!(self.to, "{text}").map_err(output("write the dump"))
    }

    fn print_gap(&mut self, gap: Option<(Range<u64>, Gap)>) -> Result<()> {
        let Some((range, kind)) = gap else {
            return Ok(());
        };
        self.before = None;
        self.repeated = false;
        let what = match kind {
            Gap::Hole => "never populated",
            Gap::NoMemory => "no memory",
            Gap::Unmapped => "not mapped",
        };
        self.line(&format!(
            "{:#018x}  {what} up to {:#x}",
            range.start, range.end
        ))
    }

    fn tag_line(&mut self, address: u64, tags: &[u8]) -> Result<()> {
        if self.before.as_deref() == Some(tags) {
            if !self.repeated {
                self.line("*")?;
            }
            self.repeated = true;
            return Ok(());
        }
        self.repeated = false;
        let mut line = format!("{address:#018x} ");
        for group in tags.chunks(GROUP) {
            line.push(' ');
            line.extend(group.iter().map(|tag| digit(*tag)));
        }
        let whole = tags.len() as u64 * GRANULE == LINE;
        self.before = whole.then(|| tags.to_vec());
        self.line(&line)
    }
}

fn digit(tag: u8) -> char {
    char::from_digit(tag.into(), 16).unwrap_or('?')
}

impl Dumper for Text<'_> {
    fn tags(&mut self, address: u64, tags: &[u8]) -> Result<()> {
        let gap = self.gap.0.take();
        self.print_gap(gap)?;
        let (mut at, mut rest) = (address, tags);
        while !rest.is_empty() {
            let room = (LINE - at % LINE) / GRANULE;
            let (line, behind) = rest.split_at(rest.len().min(room as usize));
            self.tag_line(at, line)?;
            at += line.len() as u64 * GRANULE;
            rest = behind;
        }
        Ok(())
    }

    fn gap(&mut self, range: Range<u64>, kind: Gap) -> Result<()> {
        let before = self.gap.add(range, kind);
        self.print_gap(before)
    }

    fn end(&mut self) -> Result<()> {
        let gap = self.gap.0.take();
        self.print_gap(gap)?;
        self.to.flush().map_err(output("write the dump"))
    }
}

struct Binary<'a> {
    to: &'a mut dyn Write,
}

impl<'a> Binary<'a> {
    fn new(to: &'a mut dyn Write, range: &Range<u64>) -> Result<Self> {
        let pair = 2 * GRANULE;
        if !range.start.is_multiple_of(pair) || !range.end.is_multiple_of(pair) {
            return Err(Error::HalfByte);
        }
        Ok(Self { to })
    }
}

impl Dumper for Binary<'_> {
    fn tags(&mut self, _: u64, tags: &[u8]) -> Result<()> {
        let (pairs, _) = tags.as_chunks::<2>();
        let packed: Vec<u8> = pairs.iter().map(|[low, high]| low | high << 4).collect();
        self.to.write_all(&packed).map_err(output("write the dump"))
    }

    fn gap(&mut self, range: Range<u64>, kind: Gap) -> Result<()> {
        if kind != Gap::Hole {
            return Err(Error::NotInBinary(range.start));
        }
        const ZEROS: [u8; 4096] = [0; 4096];
        let mut left = (range.end - range.start) / (2 * GRANULE);
        while left > 0 {
            let now = left.min(ZEROS.len() as u64);
            self.to
                .write_all(&ZEROS[..now as usize])
                .map_err(output("write the dump"))?;
            left -= now;
        }
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        self.to.flush().map_err(output("write the dump"))
    }
}

/// What an element of a JSON dump is.
#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Content {
    Tag(u8),
    Hole,
    NoMemory,
    Unmapped,
}

#[derive(Serialize)]
struct Span {
    /// Hexadecimal: JSON's readers have no 64 bits for numbers.
    address: String,
    bytes: u64,
    #[serde(flatten)]
    content: ContentFields,
}

#[derive(Serialize)]
#[serde(untagged)]
enum ContentFields {
    Tag { tag: u8 },
    Gap { gap: Content },
}

struct Json<'a> {
    to: &'a mut dyn Write,
    open: Option<(Range<u64>, Content)>,
    any: bool,
}

impl<'a> Json<'a> {
    fn new(to: &'a mut dyn Write) -> Self {
        Self {
            to,
            open: None,
            any: false,
        }
    }

    fn add(&mut self, range: Range<u64>, content: Content) -> Result<()> {
        if let Some((open, same)) = &mut self.open
            && open.end == range.start
            && *same == content
        {
            open.end = range.end;
            return Ok(());
        }
        self.close()?;
        self.open = Some((range, content));
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        let Some((range, content)) = self.open.take() else {
            return Ok(());
        };
        let span = Span {
            address: format!("{:#x}", range.start),
            bytes: range.end - range.start,
            content: match content {
                Content::Tag(tag) => ContentFields::Tag { tag },
                gap => ContentFields::Gap { gap },
            },
        };
        let before = if self.any { ",\n" } else { "[\n" };
        self.any = true;
        write!(self.to, "{before}  ").map_err(output("write the dump"))?;
        serde_json::to_writer(&mut *self.to, &span)
            .map_err(std::io::Error::from)
            .map_err(output("write the dump"))
    }
}

impl Dumper for Json<'_> {
    fn tags(&mut self, address: u64, tags: &[u8]) -> Result<()> {
        let mut at = address;
        for same in tags.chunk_by(|one, next| one == next) {
            let end = at + same.len() as u64 * GRANULE;
            self.add(at..end, Content::Tag(Tag::from_low_bits(same[0]).value()))?;
            at = end;
        }
        Ok(())
    }

    fn gap(&mut self, range: Range<u64>, kind: Gap) -> Result<()> {
        let content = match kind {
            Gap::Hole => Content::Hole,
            Gap::NoMemory => Content::NoMemory,
            Gap::Unmapped => Content::Unmapped,
        };
        self.add(range, content)
    }

    fn end(&mut self) -> Result<()> {
        self.close()?;
        let end = if self.any { "\n]\n" } else { "[]\n" };
        self.to
            .write_all(end.as_bytes())
            .and_then(|()| self.to.flush())
            .map_err(output("write the dump"))
    }
}
