//! Files out of order: a snapshot alone or on its bases, any page of it when it is needed, from many
//! threads at once.
//!
//! Opening one reads header, end and index. The end's check binds the index, the index the head of
//! each chunk, the head its contents: whatever is read later is what was written, or an error.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rangemap::{RangeMap, RangeSet};
use zerocopy::FromBytes;

use crate::batch::{Batch, same_metadata};
use crate::check::{chained, matches};
use crate::chunk::{Chunk, Decoder, Place, State};
use crate::error::{ChunkError, Error, Result, io};
use crate::header::{Header, Identity, Metadata};
use crate::index::{Index, Indexed};
use crate::runs::Runs;
use crate::source::PageSource;
use crate::wire::{END_LEN, HEAD_LEN, HEADER_LEN, Head, Kind, RawEnd};

/// The most snapshots that can be based on each other.
const MAX_CHAIN: usize = 64;

/// Bytes that can be read anywhere, by many threads at once.
pub trait ReadAt: Send + Sync {
    /// Fills `bytes` from `offset` on.
    ///
    /// # Errors
    /// Whatever keeps it from reading; `UnexpectedEof` if there are not so many.
    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;

    /// How many bytes there are.
    ///
    /// # Errors
    /// Whatever keeps it from telling.
    fn size(&self) -> io::Result<u64>;
}

impl ReadAt for File {
    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, bytes, offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

impl ReadAt for Vec<u8> {
    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let found = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.get(offset..)?.get(..bytes.len()))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(found);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

impl<T: ReadAt> ReadAt for Arc<T> {
    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        T::read_exact_at(self, bytes, offset)
    }

    fn size(&self) -> io::Result<u64> {
        T::size(self)
    }
}

/// One file, opened.
struct Layer<F> {
    file: F,
    header: Header,
    seed: u64,
    identity: Identity,
    chunks: Vec<Indexed>,
}

impl<F: ReadAt> Layer<F> {
    /// Opens a file, and says which chunk has which pages.
    fn open(file: F) -> Result<(Self, Runs<u32>)> {
        let size = file.size().map_err(io("measure the snapshot"))?;
        let mut bytes = [0; HEADER_LEN];
        read_at(&file, &mut bytes, 0).map_err(|error| match error {
            Error::Truncated { .. } => Error::NotAStream,
            error => error,
        })?;
        let (header, seed) = Header::parse(&bytes)?;
        if !header.indexed {
            return Err(Error::NotIndexed);
        }
        let end_offset = size
            .checked_sub(END_LEN as u64)
            .filter(|offset| *offset >= HEADER_LEN as u64)
            .ok_or(Error::Truncated { offset: size })?;
        let mut layer = Self {
            file,
            identity: Identity {
                id: header.id,
                check: 0,
            },
            header,
            seed,
            chunks: Vec::new(),
        };
        let mut chunk = Chunk::new();
        let end = layer.read_end(end_offset, &mut chunk)?;
        layer.identity.check = chunk.head.check;
        let index = layer.read_index(&end, end_offset, &mut chunk)?;
        layer.chunks = index.chunks;
        layer.check_holes(&index.pages, &mut chunk)?;
        Ok((layer, index.pages))
    }

    /// Holes are not read again: that they are what the index says must be found out now.
    fn check_holes(&self, pages: &Runs<u32>, chunk: &mut Chunk) -> Result<()> {
        let mut decoder = self.decoder();
        let mut holes: HashMap<u32, RangeSet<u64>> = HashMap::new();
        for (run, number) in pages.iter() {
            if self.chunks[number as usize].kind != Kind::Holes {
                continue;
            }
            let holes = match holes.entry(number) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(unknown) => {
                    self.read_indexed(number, chunk)?;
                    unknown.insert(decoder.holes(chunk)?.into_iter().collect())
                }
            };
            if holes.gaps(run).next().is_some() {
                return Err(Error::Index("a chunk has not the holes that it names"));
            }
        }
        Ok(())
    }

    fn decoder(&self) -> Decoder {
        Decoder::with_seed(self.header.metadata, self.seed)
    }

    fn read_end(&self, offset: u64, chunk: &mut Chunk) -> Result<RawEnd> {
        let place = Place { number: 0, offset };
        // What is wrong with these bytes is of no use to anybody: they are not an end.
        let right = self.read_chunk(place, END_LEN, chunk).and_then(|()| {
            chunk.must_be(Kind::End)?;
            let content = self.decoder().content(chunk)?;
            RawEnd::read_from_bytes(&content).map_err(|_| Error::EndMissing)
        });
        right.map_err(|error| match error {
            Error::Chunk { .. } => Error::EndMissing,
            error => error,
        })
    }

    /// Reads the index, which goes from where the end says it begins to the end.
    fn read_index(&self, end: &RawEnd, end_offset: u64, chunk: &mut Chunk) -> Result<Index> {
        let mut index = Index::default();
        let mut decoder = self.decoder();
        let mut check = self.seed;
        let begin = end.index_offset.get();
        let mut place = Place {
            number: 0,
            offset: begin,
        };
        let mut parts = 0;
        while place.offset < end_offset {
            let mut head = [0; HEAD_LEN];
            read_at(&self.file, &mut head, place.offset)?;
            let head = Head::parse(&head, self.seed).map_err(|problem| place.fault(problem))?;
            let len = HEAD_LEN + head.body_len();
            if len as u64 > end_offset - place.offset {
                return Err(Error::Index("it goes beyond the end"));
            }
            self.read_chunk(place, len, chunk)?;
            index.read(chunk, &mut decoder, &self.header)?;
            check = chained(check, chunk.head.check);
            place.offset += len as u64;
            parts += 1;
        }
        if !index.ends_at(begin) {
            return Err(Error::Index("its chunks do not end where it begins"));
        }
        let right = matches(check, end.index_check.get());
        if !right || index.chunks.len() as u64 + parts != end.chunks.get() {
            return Err(Error::Index("it is not the one that the end names"));
        }
        Ok(index)
    }

    /// Reads a chunk of `len` bytes, and checks its head.
    fn read_chunk(&self, place: Place, len: usize, chunk: &mut Chunk) -> Result<()> {
        chunk.place = place;
        chunk.seed = self.seed;
        // Bytes of an earlier chunk are overwritten; clearing them first would take as long.
        chunk.bytes.resize(len, 0);
        let read = read_at(&self.file, &mut chunk.bytes, place.offset).and_then(|()| {
            let head = chunk.bytes.first_chunk().expect("a chunk has a head");
            Head::parse(head, self.seed).map_err(|problem| place.fault(problem))
        });
        let fits = read.and_then(|head| {
            if HEAD_LEN + head.body_len() != len {
                return Err(place.fault(ChunkError::Length));
            }
            Ok(head)
        });
        match fits {
            Ok(head) => {
                chunk.head = head;
                Ok(())
            }
            Err(error) => {
                *chunk = Chunk::new();
                Err(error)
            }
        }
    }

    /// Reads a chunk that the index names.
    fn read_indexed(&self, number: u32, chunk: &mut Chunk) -> Result<()> {
        let indexed = self.chunks[number as usize];
        let place = Place {
            number: number.into(),
            offset: indexed.offset,
        };
        self.read_chunk(place, indexed.len, chunk)?;
        if !matches(chunk.head.check, indexed.check) || chunk.head.kind != indexed.kind {
            return Err(place.fault(ChunkError::NotIndexed));
        }
        Ok(())
    }
}

/// Where a file has its pages, which has no base: then all its runs are of pages.
fn located(layer: u16, runs: &Runs<u32>) -> Runs<Location> {
    let mut pages = Runs::default();
    for (run, chunk) in runs.iter() {
        pages.push(run.clone(), Location { layer, chunk });
    }
    pages
}

/// Where files that stand on each other have their pages; the lowest base comes first.
fn overlaid<F>(layers: &[(Layer<F>, Runs<u32>)]) -> RangeMap<u64, Location> {
    let mut pages = RangeMap::new();
    for (number, (layer, runs)) in (0..).zip(layers) {
        for (run, chunk) in runs.iter() {
            if layer.chunks[chunk as usize].kind == Kind::Holes {
                pages.remove(run.clone());
            } else {
                let layer = number;
                pages.insert(run.clone(), Location { layer, chunk });
            }
        }
    }
    pages
}

/// How many pages each chunk has, in the order of chunks.
fn live(pages: &Runs<Location>) -> Vec<(Location, u64)> {
    let of_run = |(run, chunk): (&Range<u64>, Location)| (chunk, run.end - run.start);
    let mut live: Vec<_> = pages.iter().map(of_run).collect();
    live.sort_unstable_by_key(|(chunk, _)| *chunk);
    live.dedup_by(|(next, pages), (chunk, sum)| {
        let same = next == chunk;
        if same {
            *sum += *pages;
        }
        same
    });
    live
}

fn read_at(file: &impl ReadAt, bytes: &mut [u8], offset: u64) -> Result<()> {
    file.read_exact_at(bytes, offset)
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Error::Truncated {
                offset: file.size().unwrap_or(offset),
            },
            _ => io("read the snapshot")(error),
        })
}

/// A chunk of a snapshot or of one of its bases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Location {
    /// 0 is the lowest base.
    layer: u16,
    chunk: u32,
}

/// A snapshot with its bases: what memory was when it was taken.
pub struct Snapshot<F> {
    /// The lowest base first.
    layers: Vec<Layer<F>>,
    pages: Runs<Location>,
    /// How many pages each chunk has that no later one replaced, in the order of files and chunks.
    live: Vec<(Location, u64)>,
}

impl<F: ReadAt> Snapshot<F> {
    /// Opens a file. `bases` finds the base of a delta, and that one's, until one is whole.
    ///
    /// # Errors
    /// [`Error::BaseMissing`] if `bases` has none; [`Error::WrongBase`] if what it has is not the
    /// snapshot named, or was changed since; [`Error::Metadata`] if a base has other metadata;
    /// [`Error::NotIndexed`]; [`Error::EndMissing`] and others if a file is damaged; what `bases`
    /// returns.
    pub fn open(file: F, mut bases: impl FnMut(&Identity) -> Result<Option<F>>) -> Result<Self> {
        let mut layers = vec![Layer::open(file)?];
        while let Some(wanted) = layers[layers.len() - 1].0.header.base {
            if layers.len() == MAX_CHAIN {
                return Err(Error::ChainTooLong {
                    given: layers.len() + 1,
                    limit: MAX_CHAIN,
                });
            }
            let base = bases(&wanted)?.ok_or(Error::BaseMissing(wanted))?;
            let (base, pages) = Layer::open(base)?;
            if base.identity != wanted {
                return Err(Error::WrongBase {
                    wanted,
                    given: base.identity,
                });
            }
            let metadata = layers[0].0.header.metadata;
            same_metadata("the base", base.header.metadata, "the snapshot", metadata)?;
            layers.push((base, pages));
        }
        layers.reverse();
        Ok(Self::compose(layers))
    }

    /// Opens a file that has no base.
    ///
    /// # Errors
    /// Those of [`Self::open`].
    pub fn open_whole(file: F) -> Result<Self> {
        Self::open(file, |_| Ok(None))
    }

    fn compose(layers: Vec<(Layer<F>, Runs<u32>)>) -> Self {
        let pages = match layers.as_slice() {
            [(_, runs)] => located(0, runs),
            layers => Runs::from(&overlaid(layers)),
        };
        let live = live(&pages);
        Self {
            layers: layers.into_iter().map(|(layer, _)| layer).collect(),
            pages,
            live,
        }
    }

    fn top(&self) -> &Layer<F> {
        &self.layers[self.layers.len() - 1]
    }

    /// The header of the file itself, not of a base.
    pub fn header(&self) -> &Header {
        &self.top().header
    }

    /// What pages have besides data.
    pub fn metadata(&self) -> Metadata {
        self.header().metadata
    }

    /// What a delta on this snapshot names as its base.
    pub fn identity(&self) -> Identity {
        self.top().identity
    }

    /// The chunk with this page; none, if the page is not populated.
    pub fn find(&self, page: u64) -> Option<Location> {
        self.pages.get(page)
    }

    /// The pages that are populated, as runs in order; a run may be cut into several.
    pub fn populated(&self) -> impl Iterator<Item = Range<u64>> {
        self.located().map(|(run, _)| run)
    }

    /// The same, each run with the chunk that it is in.
    pub fn located(&self) -> impl Iterator<Item = (Range<u64>, Location)> {
        self.pages.iter().map(|(run, chunk)| (run.clone(), chunk))
    }

    /// How many pages are populated.
    pub fn pages(&self) -> u64 {
        self.live.iter().map(|(_, pages)| pages).sum()
    }

    /// All chunks that have pages of this snapshot, in the order of files and chunks.
    pub fn chunks(&self) -> impl Iterator<Item = Location> {
        self.live.iter().map(|(chunk, _)| *chunk)
    }

    /// The saved states of the file itself, in the order in which they were written.
    ///
    /// # Errors
    /// [`Error::Chunk`], [`Error::Io`]; [`Error::StateName`] if there are two of a name. What
    /// `state` returns.
    pub fn states(&self, mut state: impl FnMut(State<'_>) -> Result<()>) -> Result<()> {
        let top = self.top();
        let mut decoder = top.decoder();
        let mut chunk = Chunk::new();
        let mut names = HashSet::new();
        let states = (0..).zip(&top.chunks);
        for (number, _) in states.filter(|(_, chunk)| chunk.kind == Kind::State) {
            top.read_indexed(number, &mut chunk)?;
            let found = decoder.state(&chunk)?;
            if !names.insert(found.name.to_owned()) {
                return Err(Error::StateName {
                    name: found.name.to_owned(),
                    problem: "there are two",
                });
            }
            state(found)?;
        }
        Ok(())
    }

    /// The pages of this snapshot that `source` does not have, in order.
    ///
    /// # Errors
    /// [`Error::Source`].
    pub(crate) fn not_in(&self, source: &impl PageSource) -> Result<Vec<Range<u64>>> {
        let mut gone: RangeSet<u64> = self.populated().collect();
        let mut from = 0;
        while let Some(run) = source.next_run(from).map_err(|source| Error::Source {
            first: from,
            last: from,
            source,
        })? {
            if run.start < from || run.is_empty() {
                return Err(Error::Order { page: run.start });
            }
            from = run.end;
            gone.remove(run);
        }
        Ok(gone.into_iter().collect())
    }

    /// What a thread needs to read chunks.
    pub fn reader(&self) -> SnapshotReader<'_, F> {
        SnapshotReader {
            snapshot: self,
            decoders: self.layers.iter().map(Layer::decoder).collect(),
            chunk: Chunk::new(),
            batch: Batch::new(self.metadata()),
        }
    }
}

/// Reads chunks of a snapshot, with the room for it.
pub struct SnapshotReader<'a, F> {
    snapshot: &'a Snapshot<F>,
    decoders: Vec<Decoder>,
    chunk: Chunk,
    batch: Batch,
}

impl<F: ReadAt> SnapshotReader<'_, F> {
    /// The pages of a chunk that are of this snapshot: those that neither a later chunk nor a later
    /// snapshot replaced.
    ///
    /// # Errors
    /// [`Error::Chunk`]; [`Error::Io`], [`Error::Truncated`] if the file fails now or has become
    /// shorter; [`Error::Index`] if the chunk has not the pages that the index says;
    /// [`Error::ForeignChunk`] if the location is one of another snapshot and this one has none
    /// there.
    pub fn read(&mut self, location: Location) -> Result<&Batch> {
        let live = &self.snapshot.live;
        let place = live.binary_search_by_key(&location, |(chunk, _)| *chunk);
        let (_, expected) = live[place.map_err(|_| Error::ForeignChunk)?];
        let layer = usize::from(location.layer);
        self.snapshot.layers[layer].read_indexed(location.chunk, &mut self.chunk)?;
        self.decoders[layer].pages(&self.chunk, &mut self.batch)?;
        let pages = &self.snapshot.pages;
        self.batch.retain(|page| pages.get(page) == Some(location));
        if self.batch.len() as u64 != expected {
            self.batch.clear();
            return Err(Error::Index("a chunk has not the pages that it names"));
        }
        Ok(&self.batch)
    }

    /// All pages of the chunk with this one, or none if the page is not populated.
    ///
    /// # Errors
    /// Those of [`Self::read`].
    pub fn read_with(&mut self, page: u64) -> Result<Option<&Batch>> {
        match self.snapshot.find(page) {
            Some(location) => self.read(location).map(Some),
            None => Ok(None),
        }
    }
}

/// Tells pages that have changed since a snapshot from those that have not.
pub(crate) struct Changes<'a, F> {
    base: &'a Snapshot<F>,
    reader: SnapshotReader<'a, F>,
}

impl<'a, F: ReadAt> Changes<'a, F> {
    /// Compares with `base`.
    pub(crate) fn since(base: &'a Snapshot<F>) -> Self {
        Self {
            base,
            reader: base.reader(),
        }
    }

    /// Removes the pages whose data and tags are those of the snapshot.
    ///
    /// # Errors
    /// Those of [`SnapshotReader::read`].
    pub(crate) fn keep(&mut self, batch: &mut Batch) -> Result<()> {
        let mut unchanged = HashSet::new();
        let located = |page: &u64| self.base.find(*page);
        let chunks: BTreeSet<Location> = batch.numbers().iter().filter_map(located).collect();
        for chunk in chunks {
            let then: HashMap<_, _> = self
                .reader
                .read(chunk)?
                .iter()
                .map(|(number, data, tags)| (number, (data, tags)))
                .collect();
            let same = batch
                .iter()
                .filter(|(number, data, tags)| then.get(number) == Some(&(data, *tags)))
                .map(|(number, ..)| number);
            unchanged.extend(same);
        }
        batch.retain(|page| !unchanged.contains(&page));
        Ok(())
    }
}
