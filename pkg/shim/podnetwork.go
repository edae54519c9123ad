package shim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/shim/network"
)

const (
	// maxQueuePairs of a network card: each has a vector and a goroutine in
	// the VMM, and more than these bring nothing that a tap can carry.
	maxQueuePairs = 4
	// networkTime bounds what follows from a change in the pod's network
	// namespace.
	networkTime = time.Minute
)

// podNetwork is *network.Network.
type podNetwork interface {
	RaiseLoopback() error
	Connect(queuePairs int) ([]network.Device, error)
	Attached(d network.Device, pciAddress string)
	Refuse(d network.Device) error
	Describe() (*agentproto.Network, error)
	Departed() []string
	Watch(changed func()) error
	Forward(dial network.Dial) error
	Close() error
}

// netState is a sandbox's network.
type netState struct {
	// pod is nil until the namespace is known.
	pod        podNetwork
	queuePairs int

	mu sync.Mutex // held while the guest is being told
	// told is what the guest knows.
	told *agentproto.Network
}

// networkNamespace is the path of the namespace that a container is to be in;
// empty for one of its own.
func networkNamespace(spec *specs.Spec) string {
	if spec.Linux != nil {
		for _, ns := range spec.Linux.Namespaces {
			if ns.Type == specs.NetworkNamespace {
				return ns.Path
			}
		}
	}
	return ""
}

// connectNetwork joins what is in the pod's namespace, before the machine
// starts. The devices' files are the caller's.
func (s *sandbox) connectNetwork(path string, vcpus int) (_ []network.Device, err error) {
	s.net.queuePairs = min(vcpus, maxQueuePairs)
	if path == "" {
		return nil, nil
	}
	if s.net.pod, err = s.host.openNetwork(path); err != nil {
		return nil, err
	}
	devices, err := s.net.pod.Connect(s.net.queuePairs)
	if err != nil {
		return nil, fmt.Errorf("network namespace %s: %w", path, err)
	}
	return devices, nil
}

// describeNetwork is for a machine that runs and has not been told of its
// network. One without a namespace gets that of the VMM's process: who connects
// a container by its process, as Docker does, finds it there.
func (s *sandbox) describeNetwork() (_ *agentproto.Network, err error) {
	own := s.net.pod == nil
	if own {
		if s.net.pod, err = s.host.openNetwork(fmt.Sprintf("/proc/%d/ns/net", s.vm.Pid())); err != nil {
			return nil, err
		}
		if err := s.net.pod.RaiseLoopback(); err != nil {
			return nil, err
		}
	} else if err := s.net.pod.Forward(s.forward); err != nil {
		// The host's kernel cannot. The pod has its network nevertheless.
		log.L.WithError(err).Warn("port-forward to this pod does not work")
	}
	s.net.told, err = s.net.pod.Describe()
	return s.net.told, err
}

// watchNetwork keeps the guest's network the same as the pod's.
func (s *sandbox) watchNetwork() error {
	return s.net.pod.Watch(func() {
		s.mu.Lock()
		stopping := s.stopping
		s.mu.Unlock()
		if stopping || s.alive() != nil {
			return
		}
		if err := s.syncNetwork(context.Background()); err != nil {
			log.L.WithError(err).Error("a change of the pod's network does not get into the guest")
		}
	})
}

// syncNetwork brings the guest's network up to date.
func (s *sandbox) syncNetwork(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, networkTime)
	defer cancel()
	s.net.mu.Lock()
	defer s.net.mu.Unlock()
	devices, err := s.net.pod.Connect(s.net.queuePairs)
	if err != nil {
		return err
	}
	var errs []error
	for _, d := range devices {
		if err := s.attachNetwork(ctx, d); err != nil {
			errs = append(errs, fmt.Errorf("link %s: %w", d.Link, err))
		}
	}
	now, err := s.net.pod.Describe()
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	if network.Equal(now, s.net.told) {
		return errors.Join(errs...)
	}
	if err := s.agent.UpdateNetwork(ctx, now); err != nil {
		return errors.Join(append(errs, err)...)
	}
	s.net.told = now
	for _, address := range s.net.pod.Departed() {
		if err := s.vm.Detach(ctx, address); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (s *sandbox) attachNetwork(ctx context.Context, d network.Device) error {
	defer closeDevices([]network.Device{d})
	address, err := s.vm.AttachNIC(ctx, d.NIC, d.Files)
	if err != nil {
		return errors.Join(err, s.net.pod.Refuse(d))
	}
	s.net.pod.Attached(d, address)
	return nil
}

func closeDevices(devices []network.Device) {
	for _, d := range devices {
		for _, f := range d.Files {
			f.Close()
		}
	}
}

// forward connects with a port of the guest's loopback.
func (s *sandbox) forward(ctx context.Context, port uint16, ipv6 bool) (*net.UnixConn, error) {
	id := streamID()
	conn, err := s.dialStream(ctx, id)
	if err != nil {
		return nil, err
	}
	if err := s.agent.Forward(ctx, id, port, ipv6); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// closeNetwork leaves the pod's namespace as it was.
func (s *sandbox) closeNetwork() error {
	if s.net.pod == nil {
		return nil
	}
	return s.net.pod.Close()
}
