//! Memory of the device: what is promised of it, and what the emulation adds for tests.

use crate::{device, get, put};
use mneme_kernels::cuda::{Device, Error};

#[test]
fn memory_is_copied_zeroed_and_sliced() {
    let Some(dev) = device() else { return };
    let numbers: Vec<u32> = (0..1000).collect();
    let from = put(dev, &numbers);
    let mut to = dev.zeroed::<u32>(1000).expect("room");
    assert_eq!(get(dev, &to), vec![0; 1000]);
    dev.copy(from.slice(10..20), to.slice_mut(500..510))
        .expect("copy");
    let (low, high) = to.all_mut().split_at_mut(505);
    assert_eq!((low.len(), high.len()), (505, 495));
    dev.zero(high).expect("zero");
    let got = get(dev, &to);
    assert_eq!(got[499..512], [0, 10, 11, 12, 13, 14, 0, 0, 0, 0, 0, 0, 0]);
    assert!(get(dev, &put::<u8>(dev, &[])).is_empty());
    assert!(dev.total_bytes() > 0 && dev.n_multiprocessors() > 0 && !dev.name().is_empty());
}

#[test]
#[should_panic(expected = "numbers 5..11 of a device buffer of 10")]
fn a_slice_past_the_end_panics() {
    let Some(dev) = device() else {
        panic!("numbers 5..11 of a device buffer of 10: no device to say it");
    };
    put(dev, &[0u8; 10]).slice(5..11);
}

#[test]
fn what_is_not_there_is_refused_in_words() {
    let Some(dev) = device() else {
        // Without a driver or a device the first one is refused too.
        assert!(Device::open(0).is_err());
        return;
    };
    let count = Device::count();
    match Device::open(count) {
        Err(e @ Error::NoDevice { .. }) => assert!(e.to_string().contains(&count.to_string())),
        other => panic!("not refused: {:?}", other.map(|d| d.name().to_string())),
    }
    match dev.alloc::<u8>(1 << 60) {
        Err(e) => assert!(!e.to_string().is_empty()),
        Ok(_) => panic!("2^60 bytes were given"),
    }
}

/// Tests rely on it: what was never written shows.
#[cfg(feature = "cuda-host")]
#[test]
fn fresh_memory_is_nan() {
    let Some(dev) = device() else { return };
    let fresh = dev.alloc::<f32>(100).expect("room");
    assert!(get(dev, &fresh).iter().all(|x| x.is_nan()));
}
