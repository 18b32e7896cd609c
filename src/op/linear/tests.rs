use super::*;
use crate::op::blocks::{BlockType, quantize};
use crate::op::isa::Isa;
use crate::op::laws::{check, f32, gap, off, random};
use candle_core::DType;
use half::{bf16, f16};
use std::sync::Arc;

#[test]
fn kernel_equals_the_plain_product() {
    for (lead, ins, outs) in [(&[1][..], 3, 5), (&[2, 7], 16, 9), (&[3, 40], 33, 64)] {
        let x: Vec<usize> = lead.iter().copied().chain([ins]).collect();
        let inputs = random(&[&x, &[outs, ins]], 1);
        check(&format!("{x:?} to {outs}"), &inputs, 1e-5, &|i| {
            linear(&i[0], &i[1].clone().into())
        });
    }
}

#[test]
fn views_are_read_where_they_stand() {
    let inputs = random(&[&[2, 5, 6], &[9, 4]], 2);
    check("narrowed x, narrowed w", &inputs, 1e-5, &|i| {
        linear(&i[0].narrow(2, 1, 4)?, &i[1].narrow(0, 3, 5)?.into())
    });
    check(
        "transposed x",
        &random(&[&[2, 4, 5], &[3, 4]], 3),
        1e-5,
        &|i| linear(&i[0].transpose(1, 2)?, &i[1].clone().into()),
    );
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let inputs = random(&[&[2, 5], &[3, 4]], 1);
    let message = linear(&inputs[0], &inputs[1].clone().into())
        .unwrap_err()
        .to_string();
    assert!(message.contains("4 inputs"), "{message}");
}

#[test]
fn gradients_of_pieces_are_summed_up() {
    // dy [M, N] and x [M, K] of two pieces.
    let pieces = random(&[&[7, 5], &[7, 3], &[2, 5], &[2, 3]], 6);
    let like = Tensor::zeros((5, 3), DType::F64, &Device::Cpu).unwrap();
    let mut gradient = Matrix::from(f32(&like)).gradient().unwrap();
    let mut truth = like;
    for piece in pieces.chunks(2) {
        let (dy, x) = (&piece[0], &piece[1]);
        gradient.add_product(0, &f32(dy), &f32(x)).unwrap();
        truth = (truth + dy.t().unwrap().matmul(x).unwrap()).unwrap();
    }
    assert!(gap(&gradient.finish().unwrap(), &truth) < 1e-6);
}

/// In f32 as their entries do, in bf16 nearly so: value, gradient of x, and the matrix's own, of all rows or some, over two passes.
#[test]
fn trained_matrices_give_what_their_entries_give() {
    for (compute, bound) in [(DType::F32, 1e-6), (DType::BF16, 2e-2)] {
        for (m, n, k) in [(1, 3, 5), (40, 131, 100), (9, 1100, 7)] {
            let inputs = random(&[&[n, k], &[2, m, k]], 8);
            let wide = inputs[0].to_dtype(DType::BF16).unwrap();
            let wide = wide.to_dtype(DType::F32).unwrap();
            let trained = Trained::new(&wide, compute).unwrap();
            let matrix = Matrix::Trained(trained.clone());
            assert_eq!((matrix.dtype(), matrix.shape()), (compute, vec![n, k]));
            let round = |x: &Tensor| x.to_dtype(DType::BF16).unwrap();
            let x = round(&inputs[1]).to_dtype(DType::F32).unwrap();
            let of = |w: &Matrix, x: &Tensor| -> [Tensor; 2] {
                // Some rows weigh more, and one is left out.
                let x = candle_core::Var::from_tensor(&x.to_dtype(w.dtype()).unwrap()).unwrap();
                let all = linear(&x, w).unwrap();
                let some = linear(&x, &w.rows(1, n - 2).unwrap()).unwrap();
                let loss = all.sqr().unwrap().sum_all().unwrap() + some.sum_all().unwrap();
                let grads = loss.unwrap().backward().unwrap();
                [all.detach(), grads.get(&x).unwrap().clone()]
            };
            let var = candle_core::Var::from_tensor(&wide).unwrap();
            let dense = Matrix::from(var.as_tensor().clone());
            let [y, dx] = of(&matrix, &x);
            of(&matrix, &x);
            let [true_y, true_dx] = of(&dense, &x);
            let close = |a: &Tensor, b: &Tensor, what: &str| {
                let off = crate::op::laws::distance(a, b);
                assert!(off < bound, "{compute:?} {m} {n} {k} {what}: {off}");
            };
            close(&y, &true_y, "y");
            close(&dx, &true_dx, "dx");
            let x = x.reshape(((), k)).unwrap();
            let once = {
                let all = (2.0 * linear(&x, &dense).unwrap()).unwrap().detach();
                let some = Tensor::ones((2 * m, n - 2), DType::F32, &Device::Cpu).unwrap();
                let some = some.pad_with_zeros(1, 1, 1).unwrap();
                (all + some).unwrap().t().unwrap().matmul(&x).unwrap()
            };
            let found = trained.take_gradient().unwrap().unwrap();
            assert_eq!(found.dtype(), DType::F32);
            close(&found, &(once * 2.0).unwrap(), "dW");
            assert!(trained.take_gradient().unwrap().is_none());
            // What evaluates has none.
            of(&matrix.detach(), &x.reshape((2, m, k)).unwrap());
            assert!(trained.take_gradient().unwrap().is_none());
            let dy = true_y.reshape(((), n)).unwrap();
            let [found, truth] =
                [&matrix, &dense].map(|w| back(&dy.to_dtype(w.dtype()).unwrap(), w).unwrap());
            close(&found, &truth, "back");
            let ids = Tensor::new(&[2u32, 0, 2], &Device::Cpu).unwrap();
            let rows = matrix.gather(&ids).unwrap();
            assert_eq!(gap(&rows, &wide.index_select(&ids, 0).unwrap()), 0.0);
            assert_eq!(gap(&matrix.to_tensor().unwrap(), &wide), 0.0);
        }
    }
}

/// A random matrix in every storage, and what it means in f32.
fn stored(rows: usize, width: usize) -> Vec<(Stored, Tensor)> {
    let w = random(&[&[rows, width]], 4)[0]
        .to_dtype(DType::F32)
        .unwrap();
    let entries = w.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let bytes =
        |to: &dyn Fn(f32) -> Vec<u8>| entries.iter().flat_map(|x| to(*x)).collect::<Vec<u8>>();
    let mut all = vec![
        (Storage::F32, bytes(&|x| x.to_le_bytes().to_vec())),
        (
            Storage::F16,
            bytes(&|x| f16::from_f32(x).to_le_bytes().to_vec()),
        ),
        (
            Storage::Bf16,
            bytes(&|x| bf16::from_f32(x).to_le_bytes().to_vec()),
        ),
    ];
    for kind in BlockType::ALL {
        if let Ok(row) = kind.row_bytes(width) {
            let mut bytes = vec![0; rows * row];
            quantize(kind, &entries, None, &mut bytes);
            all.push((Storage::Blocks(kind), bytes));
        }
    }
    let (codes, scales) = quantize_float8(&entries, width);
    all.push((Storage::F8E4M3, codes));
    let make = |(storage, bytes): (Storage, Vec<u8>)| {
        // Off any alignment.
        let range = 1..1 + bytes.len();
        let owner: Owner = Arc::new([vec![0], bytes].concat());
        let mut stored = Stored::new(owner, range, storage, rows, width).unwrap();
        if storage == Storage::F8E4M3 {
            stored = stored.scaled(scales.clone()).unwrap();
            // Half of the last of four bits.
            let off = gap(&stored.to_tensor().unwrap(), &w);
            assert!(off < 1. / 16., "{off}");
        }
        let wide = stored.to_tensor().unwrap();
        (stored, wide)
    };
    all.into_iter().map(make).collect()
}

/// Few rows and many, whole and sliced, widths that fill no vector, and the gradient of x.
#[test]
fn stored_matrices_give_what_their_entries_give() {
    for (rows, width) in [(5, 3), (70, 256), (131, 100), (64, 512)] {
        for (w, wide) in stored(rows, width) {
            // Blocks round activations too where there are few rows.
            let bound = match w.storage() {
                Storage::Blocks(_) => 2e-2,
                _ => 1e-5,
            };
            let close = |a: &Tensor, b: &Tensor, bound: f64, what: &str| {
                let size = b
                    .sqr()
                    .unwrap()
                    .mean_all()
                    .unwrap()
                    .to_scalar::<f32>()
                    .unwrap()
                    .sqrt();
                let gap = crate::op::laws::gap(a, b) / f64::from(size);
                assert!(gap < bound, "{w:?} {what}: {gap}");
            };
            let matrix = Matrix::Stored(w.clone());
            for m in [1, 3, 8, 9, 40] {
                let x = random(&[&[m, width]], 5)[0].to_dtype(DType::F32).unwrap();
                let x = candle_core::Var::from_tensor(&x).unwrap();
                let y = linear(&x, &matrix).unwrap();
                let truth = linear(&x, &wide.clone().into()).unwrap();
                close(
                    &y,
                    &truth,
                    if m > 8 { 1e-5 } else { bound },
                    &format!("{m} rows"),
                );
                let part = linear(&x, &matrix.rows(2, 3).unwrap()).unwrap();
                close(&part, &y.narrow(1, 2, 3).unwrap(), 1e-5, "a slice");
                let dx = |y: &Tensor| {
                    let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
                    grads.get(&x).unwrap().clone()
                };
                close(&dx(&y), &dx(&truth), 2. * bound, "dx");
            }
            let ids = Tensor::new(&[4u32, 0, 4], &Device::Cpu).unwrap();
            let found = matrix.gather(&ids).unwrap();
            close(&found, &wide.index_select(&ids, 0).unwrap(), 1e-9, "rows");
        }
    }
}

/// Every path that this processor has, against what the entries give; a row alone gives the same bits as among others, few or many.
#[test]
fn paths_agree_and_rows_are_alone() {
    // The last two are large enough for tiles.
    for (rows, width) in [(37, 83), (130, 1056), (3, 512), (515, 1056), (640, 835)] {
        for (w, wide) in stored(rows, width) {
            let wide = wide.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let x = random(&[&[23, width]], 6)[0].to_dtype(DType::F32).unwrap();
            let x = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for isa in Isa::found() {
                let product = |x: &[f32]| {
                    let mut y = vec![f32::NAN; x.len() / width * rows];
                    let part = Part { w: &w, y: &mut y };
                    products_by(isa, x, &mut [part], &mut Scratch::default());
                    y
                };
                let together = product(&x);
                for (at, y) in together.iter().enumerate() {
                    let bound = match w.storage() {
                        Storage::Blocks(_) => 2e-2,
                        _ => 1e-6,
                    };
                    let x = &x[at / rows * width..][..width];
                    let off = off(*y, x, &wide[at % rows * width..]);
                    assert!(off < bound, "{w:?} {isa:?}: {y}, {off}");
                }
                for count in [1, 2, 3, 4, 5, 11] {
                    for (x, y) in x.chunks(count * width).zip(together.chunks(count * rows)) {
                        assert_eq!(product(x), y, "{w:?} {isa:?} {count}");
                    }
                }
            }
        }
    }
}

/// Several matrices at once, small and large enough for threads.
#[test]
fn parts_are_what_each_is_alone() {
    // Few rows and many, and matrices that tasks begin and end inside of; the last are large enough for tiles.
    for (m, width, rows) in [
        (7, 640, &[5, 400, 33][..]),
        (1, 640, &[5, 400, 33]),
        (20, 640, &[5, 400, 33]),
        (2, 1280, &[421, 437]),
    ] {
        let x = random(&[&[m, width]], 6)[0].to_dtype(DType::F32).unwrap();
        let x = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let matrices: Vec<Stored> = (rows.iter())
            .flat_map(|rows| stored(*rows, width))
            .map(|(w, _)| w)
            .collect();
        let mut scratch = Scratch::default();
        let mut alone = |w: &Stored| {
            let mut y = vec![f32::NAN; m * w.rows()];
            products(&x, &mut [Part { w, y: &mut y }], &mut scratch);
            y
        };
        let truth: Vec<Vec<f32>> = matrices.iter().map(&mut alone).collect();
        let mut found: Vec<Vec<f32>> = truth.iter().map(|y| vec![f32::NAN; y.len()]).collect();
        let parts = matrices.iter().zip(&mut found).map(|(w, y)| Part { w, y });
        products(&x, &mut parts.collect::<Vec<_>>(), &mut scratch);
        assert_eq!(found, truth, "{m} rows");
    }
}

#[test]
fn scales_that_do_not_fit_are_named() {
    let codes = |storage| {
        Stored::new(
            Arc::new(vec![0u8; 12]),
            0..12,
            storage,
            3,
            4 / Storage::entry_bytes(storage),
        )
    };
    let scaled = |scales: &[f32]| codes(Storage::F8E4M3).unwrap().scaled(scales.to_vec());
    assert!(scaled(&[1., 0., 2.]).is_ok());
    for (scales, why) in [
        (&[1., 2.][..], "2 scales for"),
        (&[1., f32::NAN, 2.], "a scale of NaN"),
        (&[1., f32::INFINITY, 2.], "a scale of inf"),
        (&[1., 2., -1.], "a scale of -1"),
    ] {
        let said = scaled(scales).unwrap_err().to_string();
        assert!(said.contains(why), "{said}");
    }
    assert!(codes(Storage::F32).unwrap().scaled(vec![1.; 3]).is_err());
}

#[test]
fn bytes_that_do_not_fit_are_named() {
    let owner: Owner = Arc::new(vec![0u8; 100]);
    let new = |range, storage, rows, width| Stored::new(owner.clone(), range, storage, rows, width);
    assert!(new(0..96, Storage::F32, 4, 6).is_ok());
    for (range, storage, rows, width) in [
        (0..104, Storage::F32, 4, 6),
        (0..92, Storage::F32, 4, 6),
        (0..0, Storage::F32, 4, 0),
        (0..96, Storage::F32, usize::MAX, 1 << 40),
        (0..34, Storage::Blocks(BlockType::Q8_0), 1, 33),
    ] {
        assert!(new(range, storage, rows, width).is_err());
    }
}

/// Products and rows by the kernels for a GPU, of matrices as they stand on it, against those of the widened entries.
#[test]
fn device_products_equal_those_of_wide_entries() {
    use super::cuda::{Groups, Weight, add_bias, add_scaled, gather};
    use crate::op::cuda::Gpu;
    use crate::op::cuda::emulated::Emulated;
    let Some(gpu) = Emulated::of("linear", 0) else {
        return;
    };
    let device = &candle_core::Device::Cpu;
    let host = |x: &Tensor| x.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>();
    for (storage, rows, width, bound) in [
        (Storage::F32, 21, 515, 1e-6),
        (Storage::F32, 3, 5, 1e-6),
        (Storage::Bf16, 9, 264, 1e-6),
        (Storage::F16, 9, 40, 4e-3),
        (Storage::F8E4M3, 21, 300, 1e-6),
        (Storage::F8E4M3, 5, 9, 1e-6),
        (Storage::Blocks(BlockType::Q8_0), 21, 288, 1e-6),
        (Storage::Blocks(BlockType::Q4K), 13, 768, 1e-6),
        (Storage::Blocks(BlockType::Q6K), 6, 256, 4e-3),
    ] {
        let name = format!("{} [{rows}, {width}]", storage.name());
        let w = random(&[&[rows, width]], 5).remove(0);
        let entries = host(&w).unwrap();
        let (codes, scales) = quantize_float8(&entries, width);
        let bytes: Vec<u8> = match storage {
            Storage::F8E4M3 => codes,
            Storage::F32 => entries.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Storage::Bf16 => (entries
                .iter()
                .flat_map(|x| bf16::from_f32(*x).to_le_bytes()))
            .collect(),
            Storage::F16 => {
                (entries.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes())).collect()
            }
            Storage::Blocks(kind) => {
                let mut bytes = vec![0; rows * kind.row_bytes(width).unwrap()];
                quantize(kind, &entries, None, &mut bytes);
                bytes
            }
        };
        let stored = Stored::new(
            Arc::new(bytes.clone()),
            0..bytes.len(),
            storage,
            rows,
            width,
        )
        .unwrap();
        let stored = match storage {
            Storage::F8E4M3 => stored.scaled(scales).unwrap(),
            _ => stored,
        };
        let weight = Weight::new(&gpu, &stored).unwrap();
        let wide = stored.to_tensor().unwrap().to_dtype(DType::F64).unwrap();
        for m in [1, 2, 3, 7, 8, 11, 40] {
            let x = random(&[&[m, width]], m as u64).remove(0);
            let x = x.to_dtype(DType::F32).unwrap();
            let y = weight
                .product(&gpu, &gpu.array(&x))
                .unwrap()
                .tensor((m, rows));
            let y_ = x
                .to_dtype(DType::F64)
                .unwrap()
                .matmul(&wide.t().unwrap())
                .unwrap();
            // More rows than the kernel takes are rounded to bf16 with the matrix.
            let rounded = m > 32
                || (m > 8 && matches!(storage, Storage::F16 | Storage::Bf16))
                || (m > 8 && storage == Storage::Blocks(BlockType::Q6K));
            let bound = if rounded && storage != Storage::F32 {
                6e-3
            } else {
                bound
            };
            let off = gap(&y, &y_);
            assert!(off < bound, "{name}, {m} rows: {off}");
        }
        let ids = gpu.upload(&[rows as u32 - 1, 0, 0]).unwrap();
        let found = weight.gather(&gpu, &ids, 3.).unwrap().tensor((3, width));
        let ids = Tensor::new(&[rows as u32 - 1, 0, 0], device).unwrap();
        let wanted = (wide.index_select(&ids, 0).unwrap() * 3.).unwrap();
        assert!(gap(&found, &wanted) < bound, "{name}: rows");
    }
    // Heads with a matrix of their group, and what stands behind.
    let (n, h, g, ins, outs, tail) = (11, 6, 3, 5, 140, 4);
    let inputs = random(&[&[n, h, ins + tail], &[g, ins, outs]], 9);
    let [x, w] = [0, 1].map(|i| inputs[i].to_dtype(DType::F32).unwrap());
    let groups = Groups {
        entries: gpu.array(&w),
        dims: [g, ins, outs],
    };
    let y = groups
        .product(&gpu, &gpu.array(&x), [h, ins + tail], tail)
        .unwrap();
    let y = y.tensor((n, h, outs + tail));
    let [x, w] = [x, w].map(|x| x.to_dtype(DType::F64).unwrap());
    let matrices: Vec<Tensor> = (0..h).map(|head| w.get(head / (h / g)).unwrap()).collect();
    let product = x.narrow(2, 0, ins).unwrap().transpose(0, 1).unwrap();
    let product = product
        .contiguous()
        .unwrap()
        .matmul(&Tensor::stack(&matrices, 0).unwrap());
    let product = product.unwrap().transpose(0, 1).unwrap();
    let y_ = Tensor::cat(&[&product, &x.narrow(2, ins, tail).unwrap()], 2).unwrap();
    assert!(gap(&y, &y_) < 1e-6);
    // What is added where it stands, and rows of activations.
    let inputs = random(&[&[4, 300], &[4, 300], &[300]], 10);
    let [a, b, bias] = [0, 1, 2].map(|i| gpu.array(&inputs[i].to_dtype(DType::F32).unwrap()));
    add_scaled(&gpu, &a, &b, 0.5).unwrap();
    add_bias(&gpu, &a, &bias).unwrap();
    let wanted = (&inputs[0] + (&inputs[1] * 0.5).unwrap()).unwrap();
    let wanted = wanted.broadcast_add(&inputs[2]).unwrap();
    assert!(gap(&a.tensor((4, 300)), &wanted) < 1e-6);
    let ids = gpu.upload(&[2, 2]).unwrap();
    let found = gather(&gpu, &a, &ids, 300).unwrap().tensor((2, 300));
    let ids = Tensor::new(&[2u32, 2], device).unwrap();
    assert!(gap(&found, &wanted.index_select(&ids, 0).unwrap()) < 1e-6);
}
