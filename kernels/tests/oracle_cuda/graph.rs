//! A captured graph runs again over whatever its buffers hold by then.

use crate::{device, get, put};
use mneme_kernels::cuda::{Device, Error, add, swiglu};

#[test]
fn a_graph_is_replayed_with_new_contents() {
    if device().is_none() {
        return;
    }
    // A device of its own: nothing else may be put into the stream while it is captured.
    let dev = &Device::open(0).expect("opened before");
    let mut x = put(dev, &[1.0f32, 2.0]);
    let y = put(dev, &[10.0f32, 20.0]);
    let graph = {
        let temporary = put(dev, &[100.0f32, 100.0]);
        dev.capture(|| {
            add::add(dev, x.all_mut(), y.all())?;
            add::add(dev, x.all_mut(), temporary.all())?;
            assert!(matches!(dev.synchronize(), Err(Error::Capturing { .. })));
            assert!(matches!(dev.upload(&[1u8]), Err(Error::Capturing { .. })));
            Ok(())
        })
        .expect("capture")
    };
    assert_eq!(get(dev, &x), [1.0, 2.0], "recorded, not run");
    // The graph keeps `temporary` although its owner is gone.
    graph.launch().expect("launch");
    assert_eq!(get(dev, &x), [111.0, 122.0]);
    dev.write(x.all_mut(), &[0.0, -1.0]).expect("write");
    graph.launch().expect("launch");
    graph.launch().expect("launch");
    assert_eq!(get(dev, &x), [220.0, 239.0]);
}

#[test]
fn a_failed_capture_leaves_the_device_usable() {
    if device().is_none() {
        return;
    }
    let dev = &Device::open(0).expect("opened before");
    let why = Error::NoDevice { n: 3, count: 1 };
    assert!(dev.capture(|| Err(why)).is_err());
    let x = put(dev, &[0.0f32; 4]);
    let mut out = put(dev, &[1.0f32; 4]);
    swiglu::swiglu(dev, x.all(), x.all(), out.all_mut()).expect("swiglu");
    assert_eq!(get(dev, &out), [0.0; 4]);
}
