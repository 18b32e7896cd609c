//! In a program without CUDA there is no device, and nobody has one.

use std::marker::PhantomData;

use candle_core::{DType, Device, Result, bail};

use super::{Arg, Array, Gpu, Launch, Recorded};

/// A device that cannot be.
#[derive(Debug)]
pub struct Cuda<'a> {
    never: Never,
    views: PhantomData<&'a ()>,
}

#[derive(Debug)]
pub enum Never {}

impl Cuda<'_> {
    /// # Errors
    /// Always.
    pub fn on(device: &Device) -> Result<Self> {
        bail!(
            "this binary was built without cuda, and {:?} is not the CPU",
            device.location()
        )
    }
}

impl Array for Never {
    fn dtype(&self) -> DType {
        match *self {}
    }
    fn len(&self) -> usize {
        match *self {}
    }
}

impl Gpu for Cuda<'_> {
    type Array = Never;
    type Recording = Never;

    fn empty(&self, _: DType, _: usize) -> Result<Never> {
        match self.never {}
    }
    fn upload_bytes(&self, _: DType, _: &[u8]) -> Result<Never> {
        match self.never {}
    }
    fn read(&self, _: &Never, _: usize, _: &mut [u8]) -> Result<()> {
        match self.never {}
    }
    fn write(&self, _: &Never, _: usize, _: &[u8]) -> Result<()> {
        match self.never {}
    }
    fn copy(&self, _: &Never, _: usize, _: usize, _: usize) -> Result<()> {
        match self.never {}
    }
    fn clear(&self, _: &Never, _: usize, _: usize) -> Result<()> {
        match self.never {}
    }
    fn product(&self, _: &Never, _: &Never, _: usize) -> Result<Never> {
        match self.never {}
    }
    fn free_memory(&self) -> Result<usize> {
        match self.never {}
    }
    fn shared_memory(&self) -> usize {
        match self.never {}
    }
    fn record<T, R>(
        &self,
        _: impl Fn() -> Result<T>,
        _: impl FnOnce(&T) -> Result<R>,
    ) -> Result<Recorded<R, Never, T>> {
        match self.never {}
    }
    fn replay(&self, _: &Never) -> Result<()> {
        match self.never {}
    }
    fn launch(&self, _: &Launch, _: &[Arg<Never>]) -> Result<()> {
        match self.never {}
    }
}
