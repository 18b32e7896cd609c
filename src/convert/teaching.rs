//! The teacher, and the hybrid behind it, on their way through the text that mixers are fitted to: a layer at a time, a piece of the text
//! at a time. What is between two layers stands in files without a name, so that a text of any length takes the memory of a piece.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

use candle_core::{Device, Tensor};

use crate::data::Batch;
use crate::mixer::calibration::{Sample, fit_output};
use crate::mixer::{Mixer, MixerConfig};
use crate::model::{Layer, Lm, Parts};
use crate::weights::{Place, Weights};
use crate::{Error, Result};

/// Tokens that mixers are chosen by, from the beginning of the text; the output projection is fitted to all of it.
pub const CHOICE: usize = 8_192;
/// Tokens of a piece.
pub const PIECE: usize = 4096;

pub(super) struct Teaching {
    lm: Lm,
    pieces: Vec<Batch>,
    /// The teacher's residual stream before the current layer.
    teachers: Stream,
    /// The hybrid's; none: mixers are fitted to the teacher's inputs.
    own: Option<Stream>,
}

impl Teaching {
    /// With `own_inputs` output projections are fitted to what reaches them in the hybrid.
    pub fn new(teacher: &Parts, text: &Batch, own_inputs: bool) -> Result<Self> {
        let lm = teacher.lm(&Place::cpu())?;
        let rows = (PIECE / text.len).max(1);
        let pieces = (0..text.rows).step_by(rows);
        let pieces: Vec<Batch> = pieces.map(|from| text.part(from, rows)).collect();
        let mut teachers = Stream::new(rows, text.len, lm.config.hidden_size)?;
        let mut own = own_inputs.then(|| teachers.like()).transpose()?;
        for (i, piece) in pieces.iter().enumerate() {
            let shape = (piece.rows, piece.len);
            let ids = Tensor::from_slice(&piece.input_ids, shape, lm.device())?;
            let hidden = lm.embed(&ids)?;
            teachers.write(i, &hidden)?;
            own.iter_mut().try_for_each(|own| own.write(i, &hidden))?;
        }
        Ok(Self {
            lm,
            pieces,
            teachers,
            own,
        })
    }

    /// The layer's mixer, read and written by the teacher, on the beginning of the text.
    pub fn choice(&mut self, layer: usize) -> Result<Vec<Sample>> {
        let count = CHOICE.div_ceil(self.pieces[0].rows * self.pieces[0].len);
        let layer = &self.lm.layers[layer];
        let pieces = self.pieces.iter().take(count).enumerate();
        let samples = pieces.map(|(i, piece)| {
            let before = self.teachers.read(i, piece.rows)?;
            taught(layer, &before, piece)
        });
        samples.collect()
    }

    /// Fits the output projection of the layer that was just born once more: to what the hybrid's layers before it give,
    /// towards the teacher's residual stream; without inputs of its own, to the whole text.
    pub fn fit(
        &mut self,
        layer: usize,
        config: &MixerConfig,
        born: Vec<(String, Tensor)>,
    ) -> Result<Vec<(String, Tensor)>> {
        let all: usize = self.pieces.iter().map(|piece| piece.rows * piece.len).sum();
        if self.own.is_none() && all <= CHOICE {
            return Ok(born);
        }
        let layer = &self.lm.layers[layer];
        let samples = self.pieces.iter().enumerate().map(|(i, piece)| {
            let before = self.teachers.read(i, piece.rows)?;
            let taught = taught(layer, &before, piece)?;
            let Some(own) = &mut self.own else {
                return Ok(taught);
            };
            let own = own.read(i, piece.rows)?;
            let between = layer.joined(&before, &taught.output)?;
            Ok(Sample {
                input: layer.mixer_input(&own)?,
                output: layer.missing(&between, &own)?,
                documents: taught.documents,
            })
        });
        Ok(fit_output(config, born, samples)?.tensors)
    }

    /// Both pass a layer, the hybrid with its own mixer where it has one.
    pub fn pass(
        &mut self,
        layer: usize,
        mixer: Option<(&MixerConfig, &[(String, Tensor)])>,
    ) -> Result<()> {
        let layer = &self.lm.layers[layer];
        let mixer = mixer
            .filter(|_| self.own.is_some())
            .map(|(config, tensors)| {
                let weights = Weights::new(tensors.iter().cloned().collect());
                Mixer::new(config, &weights)
            });
        let mixer = mixer.transpose()?;
        for (i, piece) in self.pieces.iter().enumerate() {
            let documents = Some(&piece.documents);
            let before = self.teachers.read(i, piece.rows)?;
            let after = layer.forward(&before, documents)?.hidden;
            self.teachers.write(i, &after)?;
            if let Some(stream) = &mut self.own {
                let own = stream.read(i, piece.rows)?;
                let mixer = mixer.as_ref().unwrap_or(&layer.mixer);
                let mixed = mixer.forward(&layer.mixer_input(&own)?, documents)?;
                stream.write(i, &layer.finish(&own, &mixed)?)?;
            }
        }
        Ok(())
    }
}

/// What the teacher's mixer reads and writes where the residual stream is `before`.
fn taught(layer: &Layer, before: &Tensor, piece: &Batch) -> Result<Sample> {
    let input = layer.mixer_input(before)?;
    let documents = piece.documents.clone();
    Ok(Sample {
        output: layer.mixer.forward(&input, Some(&documents))?,
        input,
        documents,
    })
}

/// A residual stream over a text: pieces of `[rows, T, D]`, the last perhaps shorter, in a temporary file that nothing leaves behind.
struct Stream {
    file: File,
    /// Of a piece.
    dims: [usize; 3],
}

impl Stream {
    fn new(rows: usize, len: usize, width: usize) -> Result<Self> {
        let file = tempfile::tempfile().map_err(cannot(CANNOT_WRITE))?;
        let dims = [rows, len, width];
        Ok(Self { file, dims })
    }

    /// An empty one of the same sizes.
    fn like(&self) -> Result<Self> {
        let [rows, len, width] = self.dims;
        Self::new(rows, len, width)
    }

    fn seek(&mut self, piece: usize) -> Result<()> {
        let bytes = size_of::<f32>() * self.dims.iter().product::<usize>();
        let at = SeekFrom::Start((piece * bytes) as u64);
        self.file.seek(at).map(drop).map_err(cannot(CANNOT_READ))
    }

    /// Of a piece of `rows` rows.
    fn read(&mut self, piece: usize, rows: usize) -> Result<Tensor> {
        self.seek(piece)?;
        let shape = (rows, self.dims[1], self.dims[2]);
        let mut entries = vec![0f32; rows * self.dims[1] * self.dims[2]];
        let bytes = bytemuck::cast_slice_mut(&mut entries);
        self.file.read_exact(bytes).map_err(cannot(CANNOT_READ))?;
        Ok(Tensor::from_vec(entries, shape, &Device::Cpu)?)
    }

    fn write(&mut self, piece: usize, hidden: &Tensor) -> Result<()> {
        self.seek(piece)?;
        let entries: Vec<f32> = hidden.flatten_all()?.to_vec1()?;
        let bytes = bytemuck::cast_slice(&entries);
        self.file.write_all(bytes).map_err(cannot(CANNOT_WRITE))
    }
}

/// The folder of temporary files can be another one.
fn cannot(action: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    Error::io(action, &std::env::temp_dir())
}

const CANNOT_READ: &str = "cannot read a temporary file in";
const CANNOT_WRITE: &str =
    "cannot write a temporary file (set TMPDIR to a folder with more room) in";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_gives_back_its_pieces() {
        let of = |rows: usize, from: f32| {
            let end = from + (rows * 6) as f32;
            let entries = Tensor::arange(from, end, &Device::Cpu).unwrap();
            entries.reshape((rows, 2, 3)).unwrap()
        };
        let mut stream = Stream::new(4, 2, 3).unwrap();
        for (i, piece) in [of(4, 0.0), of(4, 24.0), of(1, 48.0)].iter().enumerate() {
            stream.write(i, piece).unwrap();
        }
        stream.write(1, &of(4, 100.0)).unwrap();
        for (i, piece) in [of(4, 0.0), of(4, 100.0), of(1, 48.0)].iter().enumerate() {
            let found = stream.read(i, piece.dims()[0]).unwrap();
            assert_eq!(
                found.to_vec3::<f32>().unwrap(),
                piece.to_vec3::<f32>().unwrap()
            );
        }
    }
}
