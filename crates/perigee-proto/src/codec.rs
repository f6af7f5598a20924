//! How messages become bytes: protobuf as everywhere, in buffers of a size that suits streams of tokens. A stream goes round
//! in its buffer, so thousands of them pass as many bytes of memory as their buffers have, not as they say.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::BufferSettings;
use tonic_prost::{ProstDecoder, ProstEncoder};

/// Bytes before a message on a gRPC stream: whether it is compressed, and its length, the highest byte first.
pub const FRAME_BYTES: usize = 5;
/// Bytes of a stream's buffer at first; a longer message has it grow.
const BUFFER_BYTES: usize = 1 << 10;
/// Bytes beyond which messages that are ready no longer leave together; tonic's default.
const TOGETHER_BYTES: usize = 32 << 10;

/// The codec of all services: sends `T`, receives `U`.
#[derive(Debug, Clone)]
pub struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> tonic::codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(buffers())
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(buffers())
    }
}

/// The buffers of a codec.
pub fn buffers() -> BufferSettings {
    BufferSettings::new(BUFFER_BYTES, TOGETHER_BYTES)
}
